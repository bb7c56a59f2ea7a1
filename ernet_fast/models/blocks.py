"""Residual blocks: the projection block that opens a stage, and the ER blocks that follow it.

Convolutions and BatchNorms have torchvision's names (`conv1`, `bn1`, ..., `downsample.0`), so its checkpoints fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ernet_fast.er.norm_relu import batch_norm_relu, norms_supported, projection_sum, sum_relu
from ernet_fast.er.plain import is_plain
from ernet_fast.er.process_group import ProcessGroup
from ernet_fast.er.shortcut import ERShortcut
from ernet_fast.models.convolution import convolution, takes_gradients

if TYPE_CHECKING:
    from ernet_fast.er.stage import StageMaps


class ResidualBranch(nn.Module):
    """The branch H of a block: convolutions without bias, each with a BatchNorm, ReLU between them.

    The last BatchNorm is left to the block, because the ER shortcut fuses with it. `width` channels lie between the
    convolutions; `stride` and `first_dilation` (default `dilation`) are those of the first 3x3 convolution, and so are
    the `groups` of a branch that begins with a 1x1 convolution (ResNeXt).

    Three modules that timm's ResNets have may be added by their names there: `aa`, a blurring downsampling behind the
    ReLU of the first 3x3 convolution; behind the last BatchNorm `se`, channel attention, and then `drop_path`.
    """

    kernel_sizes: ClassVar[tuple[int, ...]]

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        first_dilation: int | None = None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        spatial, last = self.kernel_sizes.index(3), len(self.kernel_sizes) - 1
        for k, size in enumerate(self.kernel_sizes):
            inputs, outputs = (width if k else in_channels), (width if k < last else out_channels)
            spread = 1 if size == 1 else (first_dilation or dilation) if k == spatial else dilation
            step, padding = (stride if k == spatial else 1), spread * (size // 2)
            split = groups if k == spatial > 0 else 1
            conv = nn.Conv2d(inputs, outputs, size, step, padding, spread, split, bias=False)
            self.add_module(f"conv{k + 1}", conv)
            self.add_module(f"bn{k + 1}", nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU(inplace=True)

    @property
    def last_conv(self) -> nn.Conv2d:
        """The last convolution, whose `out_channels` are the block's."""
        return getattr(self, f"conv{len(self.kernel_sizes)}")

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        """The BatchNorm of the last convolution."""
        return getattr(self, f"bn{len(self.kernel_sizes)}")

    def branch(self, x: Tensor, *, fused: bool | None = None) -> Tensor:
        """The last convolution's output z [N, out_channels, H / stride, W / stride]; `fused`: see `batch_norm_relu`."""
        modules: dict[str, Any] = self._modules  # not by attributes: each is a call
        last, aa = len(self.kernel_sizes), modules.get("aa")
        ours = takes_gradients(x, fused=fused)
        for k in range(1, last):
            conv = modules[f"conv{k}"]
            z = convolution(x, conv) if ours else conv(x)
            x = batch_norm_relu(z, modules[f"bn{k}"], modules["relu"], fused=fused)
            if aa is not None and self.kernel_sizes[k - 1] == 3:
                x, aa = aa(x), None
        conv = modules[f"conv{last}"]
        return convolution(x, conv) if ours else conv(x)

    def normalised(self, z: Tensor) -> Tensor | None:
        """What becomes of z, where that is more than its last BatchNorm; else None, and the BatchNorm is to come."""
        modules: dict[str, Any] = self._modules
        se, drop_path = modules.get("se"), modules.get("drop_path")
        if drop_path is not None and not drop_path.training:
            drop_path = None
        if se is None and drop_path is None:
            return None
        x: Tensor = self.last_bn(z)
        x = x if se is None else se(x)
        return x if drop_path is None else drop_path(x)


class ProjectionBlock(ResidualBranch):
    """Block 0 of a stage ("Block A"): x_0 = ReLU(bn(z) + shortcut(x)), torchvision's residual block.

    The shortcut is a strided 1x1 convolution with BatchNorm (`downsample`), or the identity where shapes stay (stage 1
    of the 18- and 34-layer nets). Arguments as in `ResidualBranch`.
    """

    def __init__(self, in_channels: int, width: int, out_channels: int, *, stride: int = 1, **kw: Any) -> None:
        super().__init__(in_channels, width, out_channels, stride=stride, **kw)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor, fused: bool | None = None) -> Tensor:
        """x_0 [N, out_channels, H / stride, W / stride] of x [N, in_channels, H, W]; `fused`: see `batch_norm_relu`."""
        if fused is None:
            fused = norms_supported(x)
        z = self.branch(x, fused=fused)
        downsample: Any = self.downsample
        x_l = self.normalised(z)
        if x_l is not None or not (fused and is_plain(downsample, nn.Sequential) and len(downsample)):
            x_l = self.last_bn(z) if x_l is None else x_l
            return sum_relu(x_l, x if downsample is None else downsample(x), self.relu)
        *layers, bn = downsample
        for layer in layers:
            x = convolution(x, layer) if takes_gradients(x, fused=True) else layer(x)
        if type(bn) is nn.Identity:  # folded for inference
            return sum_relu(self.last_bn(z), x, self.relu)
        return projection_sum(z, self.last_bn, x, bn, self.relu, fused=True)


class ERBlock(ResidualBranch):
    """Block l >= 1 of a stage ("Block B"): y_l = ReLU(bn(z) + sum_i w_i * N(x_i)) over the stage's earlier maps.

    Args:
        channels: channels C of the stage's maps [N, C, H, W].
        num_maps: number of earlier maps of the stage, l.
        width: channels inside the branch; default `channels` for a basic block, `channels // 4` for the others.
        norm: "batch" or "group", the normaliser N of the shortcuts.
        num_groups: groups of norm="group".
        dilation: of the 3x3 convolutions.
        groups: of the first 3x3 convolution, where a 1x1 convolution stands before it.
        fused: default of this block's `ERShortcut` when called by itself; inside a stage, `ERStage.fused` decides.
        process_group: of the shortcuts, see `ERShortcut`; the last BatchNorm, fused with them, shares it.

    Source: equation (10) of the ERNet paper (Chandana Mani & Kamalakannan, ELCVIA).
    """

    reduction: ClassVar[int] = 4

    def __init__(
        self,
        channels: int,
        num_maps: int,
        *,
        width: int | None = None,
        norm: str = "batch",
        num_groups: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        fused: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> None:
        width = channels // self.reduction if width is None else width
        super().__init__(channels, width, channels, dilation=dilation, groups=groups)
        self.shortcut = ERShortcut(
            channels, num_maps, norm=norm, num_groups=num_groups, relu=True, fused=fused, process_group=process_group
        )

    def forward(self, y: Tensor, maps: StageMaps) -> Tensor:
        """y_l of y_{l-1}, both [N, channels, H, W]; `maps` holds x_0 ... x_{l-1} and receives x_l."""
        z = self.branch(y, fused=maps.fuses_norms)
        x_l = self.normalised(z)
        if x_l is not None:
            return maps.add(x_l, None, self.shortcut, self.relu)
        return maps.add(z, self.last_bn, self.shortcut, self.relu)


class ProjectionBasicBlock(ProjectionBlock):
    """Block 0 of two 3x3 convolutions."""

    kernel_sizes = (3, 3)


class ProjectionBottleneck(ProjectionBlock):
    """Block 0 of 1x1, 3x3 and 1x1 convolutions."""

    kernel_sizes = (1, 3, 1)


class ProjectionBlock133(ProjectionBlock):
    """Block 0 of 1x1, 3x3 and 3x3 convolutions, see `ERBlock133`."""

    kernel_sizes = (1, 3, 3)


class ERBasicBlock(ERBlock):
    """ER block of two 3x3 convolutions; arguments as in `ERBlock`."""

    kernel_sizes = (3, 3)
    reduction = 1


class ERBottleneck(ERBlock):
    """ER block of 1x1, 3x3 and 1x1 convolutions; arguments as in `ERBlock`."""

    kernel_sizes = (1, 3, 1)


class ERBlock133(ERBlock):
    """ER block of "a 1x1 convolution accompanied by two 3x3 convolutions" (ERNet paper); arguments as in `ERBlock`.

    The paper gives neither order nor widths: here they are the bottleneck's, with a 3x3 convolution from `width` to
    `channels`. Its parameter counts are those of the standard blocks, not of this one.
    """

    kernel_sizes = (1, 3, 3)
