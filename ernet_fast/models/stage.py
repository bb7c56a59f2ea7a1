"""One stage of an ER-ResNet: a projection block and the ER blocks that read its maps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.checkpoint import checkpoint

from ernet_fast.er.norm_relu import norms_supported
from ernet_fast.er.process_group import ProcessGroup
from ernet_fast.er.stage import Choice, Path, StageMaps, StageModules, choose, statistics_group
from ernet_fast.models import blocks

BLOCK_KINDS: dict[str, tuple[type[blocks.ProjectionBlock], type[blocks.ERBlock]]] = {
    "basic": (blocks.ProjectionBasicBlock, blocks.ERBasicBlock),
    "bottleneck": (blocks.ProjectionBottleneck, blocks.ERBottleneck),
    "er133": (blocks.ProjectionBlock133, blocks.ERBlock133),
}
"""The two block classes of a stage."""


class ERStage(nn.Module):
    """Blocks "0" ... "L-1" of one map shape; block l >= 1 adds weight-normalised shortcuts from every earlier map.

        x_l = H_l(y_{l-1}),   y_l = ReLU(x_l + sum_{i<l} w_{l,i} * N(x_i)),   y_0 = x_0

    Args:
        in_channels: channels of the stage's input.
        channels: channels C of the stage's maps.
        num_blocks: number of blocks L, at least 1.
        stride: of block 0.
        block: "basic" (3x3, 3x3), "bottleneck" (1x1, 3x3, 1x1) or "er133" (1x1, 3x3, 3x3).
        width: channels inside the branches; default `channels` for "basic", `channels // 4` for the others.
        norm: "batch" (per channel, running statistics for evaluation) or "group" (per sample and group).
        num_groups: groups of norm="group"; 1 is layer norm, `channels` is instance norm.
        fused: compute the last BatchNorm, all shortcuts, the sum and the ReLU of a block in one pass, and on the CPU
            every other BatchNorm with its ReLU; False composes them from plain PyTorch operators. BatchNorms and ReLUs
            of other classes, or with hooks, are called as modules, except an ER block's last ones. May be changed.
        dilation: of the 3x3 convolutions.
        first_dilation: of block 0's first 3x3 convolution, default `dilation`.
        groups: of the first 3x3 convolution of every branch but those of "basic", which has none before it (ResNeXt).
        process_group: with norm="batch", the processes over whose batches together the training statistics of the
            shortcuts, and of each ER block's last BatchNorm, are taken; needs the fused path.
            `nn.SyncBatchNorm.convert_sync_batchnorm` does this too, and synchronises all other BatchNorms as well.

    Raises:
        ValueError: a size below 1, or an unknown block.

    Source: equation (10) of the ERNet paper (Chandana Mani & Kamalakannan, ELCVIA).
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_blocks: int,
        *,
        stride: int = 1,
        block: str = "bottleneck",
        width: int | None = None,
        norm: str = "batch",
        num_groups: int | None = None,
        fused: bool = True,
        dilation: int = 1,
        first_dilation: int | None = None,
        groups: int = 1,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if block not in BLOCK_KINDS:
            raise ValueError(f"block must be one of {sorted(BLOCK_KINDS)}, got {block!r}")
        projection, er_block = BLOCK_KINDS[block]
        width = channels // er_block.reduction if width is None else width
        sizes = {"in_channels": in_channels, "channels": channels, "num_blocks": num_blocks, "width": width}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not isinstance(stride, int) or stride < 1:
            raise ValueError(f"stride must be an int of at least 1, got {stride!r}")
        if not isinstance(groups, int) or groups < 1 or width % groups or (block == "basic" and groups > 1):
            raise ValueError(
                f"groups must be an int of at least 1 that divides the width {width}, and 1 for 'basic', got {groups!r}"
            )
        self.fused = fused
        spread: dict[str, Any] = {"dilation": dilation, "groups": groups}
        opening = projection(in_channels, width, channels, stride=stride, first_dilation=first_dilation, **spread)
        self.add_module("0", opening)
        common: dict[str, Any] = {"norm": norm, "num_groups": num_groups, "fused": fused, **spread}
        for index in range(1, num_blocks):
            block_l = er_block(channels, index, width=width, process_group=process_group, **common)
            self.add_module(str(index), block_l)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return self.children()

    def __getitem__(self, index: int) -> nn.Module:
        return list(self.children())[index]

    @property
    def channels(self) -> int:
        """Channels of the stage's maps."""
        return self._opening().last_conv.out_channels

    @property
    def stride(self) -> int:
        """Size of the stage's input over that of its maps."""
        children = self._opening().named_children()
        return math.prod(total_stride(layer) for name, layer in children if name[:4] == "conv" or name == "aa")

    def _opening(self) -> blocks.ProjectionBlock:
        opening = self[0]
        assert isinstance(opening, blocks.ProjectionBlock)
        return opening

    def forward(self, x: Tensor) -> Tensor:
        """y_{L-1} [N, channels, H / stride, W / stride] of x [N, in_channels, H, W].

        Raises:
            TypeError: x is no floating tensor, or of another dtype than the weights, outside autocast.
            ValueError: it has another number of dimensions or channels.
        """
        check_input(x, self._opening().conv1)
        opening, *er_blocks = self._blocks()
        fuses_norms = self.fused and norms_supported(x)
        x_0 = opening(x, fused=fuses_norms)
        if not er_blocks:
            return x_0
        modules = self._modules_of(er_blocks)
        if torch.compiler.is_compiling() and statistics_group(modules) is not None:
            return self._run_uncompiled(x_0, er_blocks, modules, fuses_norms)
        return self._run(x_0, er_blocks, modules, fuses_norms)

    def _run(self, x_0: Tensor, er_blocks: list[Any], modules: StageModules, fuses_norms: bool) -> Tensor:
        maps = StageMaps(fused=self.fused, fuses_norms=fuses_norms)
        y = maps.start(x_0, *modules)
        for block in er_blocks:
            y = block(y, maps)
        return y

    # Collectives and the stage's own backward are not traced. torch.compiler.disable would import the compiler now.
    _run_uncompiled = _disable_dynamo(_run)

    def choice(self, x: Tensor) -> Choice:
        """The path, with the reason, that a forward pass of inputs like x [N, in_channels, H, W] would take."""
        er_blocks = self._blocks()[1:]
        if not er_blocks:
            return Choice(Path.MODULES, "the stage has no ER block")
        dtype = next((p.dtype for p in self.parameters()), x.dtype)
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        like = x.new_empty((x.shape[0], 1, 2, 2), dtype=dtype)  # the choice asks for its kind alone
        return choose(like, self._modules_of(er_blocks), fused=self.fused)

    def _blocks(self) -> list[Any]:
        """All blocks; anything may stand in a block's place that has its parts."""
        return list(self._modules.values())

    @staticmethod
    def _modules_of(er_blocks: list[Any]) -> StageModules:
        norms, relus = [block.last_bn for block in er_blocks], [block.relu for block in er_blocks]
        return StageModules([block.shortcut for block in er_blocks], norms, relus)

    def __prepare_scriptable__(self) -> ERStage:
        """Called by `torch.jit.script`, whose own error would name no way out."""
        raise TypeError(
            "torch.jit.script cannot compile an ERStage. Use torch.export.export(model.eval(), (x,)), or "
            "torch.jit.trace(model.eval(), x) where TorchScript is needed."
        )


def total_stride(module: nn.Module) -> int:
    """The factor by which the convolutions and poolings in `module` reduce the map."""
    strides = [getattr(layer, "stride", 1) for layer in module.modules()]
    return math.prod(stride if isinstance(stride, int) else stride[0] for stride in strides)


def check_input(x: Tensor, conv: Any) -> None:
    """Raise unless `x` is a floating tensor [N, C, H, W] that `conv`, the first convolution on it, takes.

    Raises:
        TypeError: x is no floating tensor, or of another dtype than the weights, outside autocast.
        ValueError: it has another number of dimensions or channels.
    """
    if isinstance(x, torch.fx.Proxy):
        return
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x is {found}; expected a floating tensor [N, C, H, W].")
    weight = getattr(conv, "weight", None)
    if type(weight) is nn.Parameter and weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"x is {x.dtype} and the weights are {weight.dtype}: convert one of them with .to(dtype), or use autocast."
        )
    if torch.jit.is_tracing():  # sizes are values of the graph, and a comparison would fix them
        return
    channels = conv.in_channels if isinstance(conv, nn.Conv2d) else None
    if x.dim() != 4 or channels not in (None, x.shape[1]):
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [N, {channels or 'C'}, H, W].")


def checkpoint_stage(stage: nn.Module, x: Tensor) -> Tensor:
    """`stage(x)`, keeping only x for backward, whose second pass leaves running statistics as the first left them."""
    return checkpoint(
        stage, x, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _ScratchBuffers(stage))
    )


class _ScratchBuffers:
    """Let a module update copies of its buffers; may be entered again, once for each backward of a retained graph.

    The copies stand in for the buffers instead of being copied back, because backward may have saved the originals.
    """

    def __init__(self, module: nn.Module) -> None:
        self._owners = list(module.modules())
        self._originals: list[dict[str, Tensor | None]] = []

    def __enter__(self) -> None:
        self._originals = [dict(owner._buffers) for owner in self._owners]
        for owner, buffers in zip(self._owners, self._originals, strict=True):
            owner._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})

    def __exit__(self, *_: object) -> None:
        for owner, buffers in zip(self._owners, self._originals, strict=True):
            owner._buffers.update(buffers)
        self._originals = []
