"""ER-ResNets: torchvision's ResNets with the identity shortcuts of a stage replaced by ER shortcuts."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ernet_fast.er.lean import lean_memory
from ernet_fast.er.norm_relu import batch_norm_relu
from ernet_fast.er.operators import why_plain
from ernet_fast.models.drop_path import DropPath
from ernet_fast.models.pooling import global_pooling
from ernet_fast.models.pretrained_folder import PretrainedFolder
from ernet_fast.models.stage import ERStage, check_input, checkpoint_stage, total_stride

EXPANSION = {"basic": 1, "bottleneck": 4}
DEFAULT_GROUPS = 32
LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
FAMILY = {depth: "basic" if depth < 50 else "bottleneck" for depth in LAYERS}
STAGE_NAMES = ("layer1", "layer2", "layer3", "layer4")
MEMORY = ("usual", "lean")


class ERResNet(PretrainedFolder):
    """A ResNet of four ER stages, with torchvision's stem, head, names of parameters and initialisation.

    Args:
        family: "basic" (the 18- and 34-layer nets) or "bottleneck" (50, 101, 152).
        layers: number of blocks of each of the four stages.
        num_classes: outputs of the classifier `fc`; 0 leaves it out, and the network returns pooled features
            [N, head_hidden_size].
        block: "standard" (3x3, 3x3 or 1x1, 3x3, 1x1 by `family`) or "er133" (1x1, 3x3, 3x3 in the family's widths).
        norm: normaliser of the shortcuts, "batch" or "group".
        num_groups: groups of norm="group", default 32; must divide the channels of every stage.
        fused: see `ERStage`; `set_fused` changes it later.
        memory: "lean" keeps for backward what convolutions give and not what epilogues make of it, which backward
            computes again: about 0.57 of a plain ResNet's peak, for the same gradients bit for bit and a few percent
            more time; see `ernet_fast.er.lean`. `set_memory` changes it later. Compiled programs choose on their own.
        in_channels: channels of the input images.
        base_channels: channels of the stem; stages are 1, 2, 4, 8 times as wide (times 4 for bottlenecks).
        groups: of the branches' first 3x3 convolutions ("bottleneck" family only), such as 32 for ResNeXt.
        width_per_group: 64, or 128 for torchvision's wide ResNets, 4 or 8 for ResNeXt ("bottleneck" family only): the
            stages' branches are base_channels * width_per_group / 64 * groups wide, times 1, 2, 4, 8.
        replace_stride_with_dilation: for stages 2, 3 and 4, whether dilation takes the place of the stride.
        drop_rate: dropout before the classifier, 0 <= drop_rate < 1.
        drop_path_rate: stochastic depth, 0 <= drop_path_rate < 1: the rate at which the last block's branch is left
            out for a sample in training; those of the others grow linearly from 0. Later shortcuts read a 0 there.
        global_pool: "avg", "max", "avgmax" (their mean), "catavgmax" (both, twice as many features), or, without a
            classifier, "" for the feature map itself.

    Attributes:
        num_features: channels C of the last feature map.
        head_hidden_size: features after pooling.

    Raises:
        TypeError: a size that is not an int.
        ValueError: any other argument out of its range.
    """

    def __init__(
        self,
        family: str,
        layers: Sequence[int],
        num_classes: int = 1000,
        *,
        block: str = "standard",
        norm: str = "batch",
        num_groups: int | None = None,
        fused: bool = True,
        memory: str = "usual",
        in_channels: int = 3,
        base_channels: int = 64,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] = (False, False, False),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        widths = {"groups": groups, "width_per_group": width_per_group}
        _check_sizes(in_channels=in_channels, base_channels=base_channels, **widths)
        _check_choices(family, layers, block, norm, replace_stride_with_dilation)
        _check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        _check_widths(family, **widths)
        narrowest = base_channels * EXPANSION[family]  # stage 1; the others have a power of two times as many
        if norm == "group":
            num_groups = DEFAULT_GROUPS if num_groups is None else num_groups
            _check_sizes(num_groups=num_groups)
            if narrowest % num_groups:
                raise ValueError(f"num_groups must divide the {narrowest} channels of stage 1, got {num_groups}")
        self.arguments = {
            "family": family,
            "layers": list(layers),
            "block": block,
            "norm": norm,
            "num_groups": num_groups,
            "in_channels": in_channels,
            "base_channels": base_channels,
            "groups": groups,
            "width_per_group": width_per_group,
            "replace_stride_with_dilation": list(replace_stride_with_dilation),
            "drop_rate": drop_rate,
            "drop_path_rate": drop_path_rate,
        }
        self.in_channels = in_channels
        self.drop_rate = drop_rate
        self.fused = fused
        self.set_memory(memory)
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_channels, base_channels, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(base_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool: nn.Module = nn.MaxPool2d(3, 2, padding=1)
        self.num_features, dilation = base_channels, 1
        for k, (num_blocks, dilate) in enumerate(zip(layers, (False, *replace_stride_with_dilation), strict=True)):
            stride, first_dilation = (1 if k == 0 else 2), dilation
            if dilate:
                stride, dilation = 1, dilation * stride
            stage = ERStage(
                self.num_features,
                narrowest * 2**k,
                num_blocks,
                stride=stride,
                block=family if block == "standard" else block,
                width=base_channels * 2**k * width_per_group // 64 * groups,
                norm=norm,
                num_groups=num_groups,
                fused=fused,
                dilation=dilation,
                first_dilation=first_dilation,
                groups=groups,
            )
            self.add_module(STAGE_NAMES[k], stage)
            self.num_features = stage.channels
        blocks = [block_l for stage in self.stages for block_l in stage]
        for index, block_l in enumerate(blocks[1:] if drop_path_rate else (), start=1):
            block_l.add_module("drop_path", DropPath(drop_path_rate * index / (len(blocks) - 1)))
        self.avgpool: nn.Module
        self.fc: nn.Module
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():  # as torchvision does; BatchNorms and ER weights start at 1 already
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def stages(self) -> list[ERStage]:
        """The stages, layer1 to layer4, or as many as `prune_intermediate_layers` has left."""
        return [getattr(self, name) for name in STAGE_NAMES if name in self._modules]

    @property
    def architecture(self) -> str | None:
        """The name of the function that makes networks of these layers, such as "er_resnet50", or None."""
        shape = self.arguments["family"], tuple(self.arguments["layers"])
        return next((f"er_resnet{d}" for d, layers in LAYERS.items() if shape == (FAMILY[d], layers)), None)

    @property
    def in_chans(self) -> int:
        """`in_channels`, by timm's name."""
        return self.in_channels

    @property
    def inplanes(self) -> int:
        """`num_features`, by the name that torchvision's feature pyramids read."""
        return self.num_features

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """One dict a feature level, as in timm: `num_chs`, `reduction` (image size over map size) and `module`."""
        reduction = total_stride(self.conv1)
        levels = [{"num_chs": self.bn1.num_features, "reduction": reduction, "module": "relu"}]
        reduction *= total_stride(self.maxpool)
        for name in STAGE_NAMES[: len(self.stages)]:
            stage = getattr(self, name)
            reduction *= stage.stride
            levels.append({"num_chs": stage.channels, "reduction": reduction, "module": name})
        return levels

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's feature map [N, num_features, H / 32, W / 32] of images [N, in_channels, H, W]."""
        with self._saving(x):
            x = self.maxpool(self._stem(x))
            for stage in self.stages:
                x = self._run_stage(stage, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of a feature map; with `pre_logits` the pooled features [N, head_hidden_size]."""
        x = self.avgpool(x)
        if self.pool_type:
            x = torch.flatten(x, 1)
        if pre_logits:
            return x
        if self.drop_rate > 0.0:
            x = nn.functional.dropout(x, self.drop_rate, self.training)
        return self.fc(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The last feature map computed and a list of those of the selected levels of `feature_info`, as in timm.

        Args:
            x: images [N, in_channels, H, W].
            indices: None for all levels, an int for the last that many, or the levels; negative ones count from the
                end.
            norm: without effect, because no normalisation follows the last stage.
            stop_early: leave out the stages after the last level selected.
            output_fmt: "NCHW".
            intermediates_only: return the list alone.

        Raises:
            ValueError: levels out of range, or another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        stages = self.stages
        selected = level_indices(len(stages) + 1, indices)
        if stop_early:
            stages = stages[: max(selected)]
        with self._saving(x):
            x = self._stem(x)
            intermediates = [x] if 0 in selected else []
            x = self.maxpool(x)
            for level, stage in enumerate(stages, start=1):
                x = self._run_stage(stage, x)
                if level in selected:
                    intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def get_intermediate_layers(self, x: Tensor, n: int | Sequence[int] = 1, **_: Any) -> list[Tensor]:
        """The maps of the last `n` levels, or of the levels `n`, as DINO's and timm's vision transformers give theirs.

        Maps are [N, C, H, W] whatever else is asked for (`reshape`, `norm`); see `forward_intermediates`.
        """
        maps = self.forward_intermediates(x, n, intermediates_only=True, stop_early=True)
        assert isinstance(maps, list)
        return maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last level selected, as in timm; returns the selected levels, counted from 0.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm: without effect, because no normalisation follows the last stage.
            prune_head: remove pooling and classifier too; they go in any case when stages do.

        Raises:
            ValueError: levels out of range.
        """
        levels = self.feature_info
        selected = level_indices(len(levels), indices)
        last = max(selected)
        for name in STAGE_NAMES[last : len(levels) - 1]:
            delattr(self, name)
        if last == 0:
            self.maxpool = nn.Identity()
        self.num_features = levels[last]["num_chs"]
        if prune_head or last < len(levels) - 1:
            self.reset_classifier(0, "")
        return selected

    def get_classifier(self, name_only: bool = False) -> Any:
        """The last layer, `nn.Linear`, or `nn.Identity` for num_classes = 0; with `name_only` its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, on the network's device and in its dtype.

        Args:
            num_classes: outputs, 0 for none.
            global_pool: as in the constructor; None keeps the pooling, but a classifier on "" gets "avg".

        Raises:
            TypeError: `num_classes` is not an int.
            ValueError: it is negative, or the pooling is unknown or "" with a classifier.
        """
        _check_sizes(least=0, num_classes=num_classes)
        if num_classes > 0 and global_pool == "":
            raise ValueError(f"global_pool='' leaves no pooled features for num_classes={num_classes}; expected 0")
        if global_pool is None and num_classes > 0 and self.pool_type == "":
            global_pool = "avg"
        if global_pool is not None:
            self.avgpool = global_pooling(global_pool).train(self.training)
            self.pool_type = global_pool
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * (2 if self.pool_type == "catavgmax" else 1)
        weight = self.conv1.weight if isinstance(self.conv1, nn.Conv2d) else next(self.parameters())
        self.fc = nn.Identity()
        if num_classes > 0:
            self.fc = nn.Linear(self.head_hidden_size, num_classes, device=weight.device, dtype=weight.dtype)
        self.fc.train(self.training)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of parameter groups for timm's layer-wise learning rates: one a block, or a stage (`coarse`)."""
        return {"stem": r"^(?:conv1|bn1|maxpool)\b", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        """Names of the ER weights: they scale shortcuts and start at 1, like the weights of normalisation layers."""
        return {name for name, _ in self.named_parameters() if name.endswith(".shortcut.weight")}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in backward instead of keeping its maps: less memory, about a third more time."""
        self.grad_checkpointing = enable

    def set_memory(self, memory: str) -> None:
        """Choose what is kept for backward: "usual" or "lean"; ValueError for anything else."""
        if memory not in MEMORY:
            raise ValueError(f"memory must be one of {MEMORY}, got {memory!r}")
        self.memory = memory

    def set_fused(self, fused: bool = True) -> None:
        """Choose the one-pass (True) or the plain PyTorch (False) computation of stem and stages; parameters stay."""
        self.fused = fused
        for module in self.modules():
            if isinstance(module, ERStage):
                module.fused = fused

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by `torch.jit.script`, whose own error would name no way out."""
        raise TypeError(
            "torch.jit.script cannot compile an ER-ResNet: use torch.jit.trace(model.eval(), images) under "
            "torch.no_grad(), or torch.export.export(model.eval(), (images,))"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled network, also of a version that always pooled by averages."""
        super().__setstate__(state)
        if "pool_type" not in self.__dict__:
            self.pool_type, self.head_hidden_size = "avg", self.num_features
            self.fused = all(stage.fused for stage in self.stages)
        self.__dict__.setdefault("memory", "usual")

    def _saving(self, x: Tensor) -> contextlib.AbstractContextManager[None]:
        """What a forward pass saves for backward is chosen here; transforms of torch.func take no hooks on that."""
        lean = self.memory == "lean" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return lean_memory() if lean and why_plain(x) is None else contextlib.nullcontext()

    def _stem(self, x: Tensor) -> Tensor:
        check_input(x, self.conv1)
        return batch_norm_relu(self.conv1(x), self.bn1, self.relu, fused=None if self.fused else False)

    def _run_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint_stage(stage, x)
        y: Tensor = stage(x)
        return y


def level_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Indices from 0 to count - 1 of the levels that `indices` selects, see `ERResNet.forward_intermediates`."""
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 1 <= indices <= count:
            raise ValueError(f"indices={indices} selects the last {indices} levels; expected 1 to {count}")
        return list(range(count - indices, count))
    wrong = [index for index in indices if not -count <= index < count]
    if wrong or len(indices) == 0:
        raise ValueError(f"indices must hold levels from {-count} to {count - 1}, got {list(indices)}")
    return [index % count for index in indices]


def _check_sizes(*, least: int = 1, **sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int, got {size!r}")
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")


def _check_choices(
    family: str, layers: Sequence[int], block: str, norm: str, replace_stride_with_dilation: Sequence[bool]
) -> None:
    for name, value, choices in (
        ("family", family, tuple(EXPANSION)),
        ("block", block, ("standard", "er133")),
        ("norm", norm, ("batch", "group")),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    if len(layers) != 4:
        raise ValueError(f"layers must have 4 entries, one a stage, got {list(layers)}")
    _check_sizes(**{f"layers[{k}]": num_blocks for k, num_blocks in enumerate(layers)})
    if len(replace_stride_with_dilation) != 3:
        raise ValueError(
            f"replace_stride_with_dilation must have 3 entries, for stages 2 to 4, got {replace_stride_with_dilation!r}"
        )


def _check_rates(**rates: float) -> None:
    for name, rate in rates.items():
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {rate}")


def _check_widths(family: str, *, groups: int, width_per_group: int) -> None:
    if family == "basic" and (groups, width_per_group) != (1, 64):
        raise ValueError(
            f"width_per_group must be 64 for the basic family, and groups 1, got {width_per_group} and {groups}"
        )
