"""The maps of one stage during one forward pass: where ER blocks leave their maps and read those of earlier blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ernet_fast import _backend
from ernet_fast.er import operators
from ernet_fast.er.batch_norms import affine, is_batch_norm, norm_arguments, one_value, spreads, uses_batch
from ernet_fast.er.coefficients import NO_NORM, BranchNorm
from ernet_fast.er.epilogue import one_operator_serves
from ernet_fast.er.epilogue_composed import BatchStage, one_call_serves
from ernet_fast.er.folded import FoldedShortcut
from ernet_fast.er.process_group import NO_NAIVE_GROUP, ProcessGroup, active_group, group_of
from ernet_fast.er.shortcut import ERShortcut
from ernet_fast.er.traceable_stage import FusedMaps
from ernet_fast.er.unfused_coefficients import MapStatistics, map_statistics
from ernet_fast.er.whole_stage import WholeStage


class StageMaps:
    """The maps x_0 ... x_l of one stage in one forward pass, made anew by each `ERStage.forward`.

    With `fused=True` the last BatchNorm of a block, all shortcuts, the sum and the ReLU are one weighted sum over the
    raw maps. With `fused=False`, for empty batches, and where no compiled operator serves the device, they are the
    naive composition.
    """

    def __init__(self, *, fused: bool, whole: bool = True) -> None:
        """Prepare for a forward pass.

        Args:
            fused: see above.
            whole: let a block's tail be one operator each way where there is one; otherwise, and on GPUs and over
                processes, it is one operator a step.
        """
        self.fused, self.whole = fused, whole
        self._batch: BatchStage | WholeStage | None = None
        self._shortcuts: list[ERShortcut] = []  # in their order, where the stage knows their weights from its start
        self._maps: FusedMaps | None = None
        self._statistics: list[MapStatistics] = []
        self._xs: list[Tensor] = []
        self._measure = False
        self._shape: torch.Size
        self._dtype: torch.dtype
        self._device: torch.device

    def start(
        self, x0: Tensor, shortcuts: Iterable[ERShortcut | FoldedShortcut], norms: Iterable[nn.Module] = ()
    ) -> Tensor:
        """File x_0, the output of the projection block.

        Args:
            x0: [N, C, H, W], after its ReLU.
            shortcuts: those of the blocks to come; they say how maps are normalised, all in one way.
            norms: the last normalisations of those blocks' branches: with `nn.SyncBatchNorm` the statistics of all maps
                are taken over the processes of its group.

        Returns:
            The tensor to feed to the next block.
        """
        self._shape, self._dtype, self._device = x0.shape, x0.dtype, x0.device
        everyone = list(shortcuts)
        shortcuts = _unfolded(everyone)
        if len(shortcuts) < len(everyone):
            self._xs.append(x0)
            return x0
        group = stage_group(shortcuts, list(norms))
        serves = operators.serves(x0)
        if self.fused and not serves and x0.device.type == "cpu":
            _backend.warn_fallback_once()
        if group is not None and not (self.fused and serves and _one_call_serves(x0, shortcuts)):
            raise RuntimeError(NO_NAIVE_GROUP)
        if not (self.fused and serves and (x0.numel() > 0 or group is not None)):
            self._xs.append(x0)
            return x0
        per_group = shortcuts[0].norm == "group"
        self._measure = per_group or any(shortcut.normalises_with_batch() for shortcut in shortcuts)
        if _one_call_serves(x0, shortcuts):
            eps = shortcuts[0].eps
            if self.whole and one_operator_serves(x0, group):
                self._shortcuts = shortcuts
                self._batch = WholeStage([shortcut.weight for shortcut in shortcuts], eps, measure=self._measure)
            else:
                self._batch = BatchStage(len(shortcuts) + 1, eps, measure=self._measure, group=group)
            return self._batch.open(x0, pass_on=True)
        self._maps = FusedMaps(per_sample=per_group)
        moments, x0 = self._maps.file(x0, measure=self._measure, pass_on=True)
        self._statistics.append(map_statistics(moments, num_groups=shortcuts[0].num_groups))
        return x0

    def add(self, z: Tensor, bn: nn.Module, shortcut: ERShortcut | FoldedShortcut) -> Tensor:
        """File the output z of a branch and return the block's output.

        Args:
            z: [N, C, H, W], output of the branch's last convolution, before its normalisation.
            bn: that normalisation, usually `nn.BatchNorm2d`.
            shortcut: the block's weights, one row for each map filed before.

        Returns:
            y = ReLU(bn(z) + sum_i weight_i * N(x_i)), [N, C, H, W].

        Raises:
            ValueError: z, or the number of maps filed, does not fit; no statistics have been moved then.
            TypeError: z has another dtype than x_0, outside autocast, under which it is converted.
        """
        self._check(z)
        if is_batch_norm(bn):
            z = self._in_dtype(z)
        if isinstance(shortcut, FoldedShortcut):
            self._xs.append(self._in_dtype(bn(z)))
            return shortcut(self._xs, fused=self.fused)
        if self._batch is not None:
            return self._add_to_batch(self._batch, z, bn, shortcut)
        if self._maps is None:
            shortcut.check_maps_filed(len(self._xs), z)
            self._xs.append(self._in_dtype(bn(z)))
            return shortcut(self._xs, fused=False)
        shortcut.check_maps_filed(len(self._statistics), z)
        collapse = is_batch_norm(bn) and not spreads(bn)
        if not collapse:  # any other normalisation runs as it is, and its output is the map
            z = self._in_dtype(bn(z))
        moments, _ = self._maps.file(z, measure=self._measure or (collapse and uses_batch(bn)))
        scale, shift = affine(bn, moments, z) if collapse else (None, None)
        # moments that bn alone needed say nothing that a shortcut with running statistics would use
        last = map_statistics(moments if self._measure else None, scale, shift, num_groups=shortcut.num_groups)
        a, b = shortcut.coefficients(self._statistics, last, z)
        self._statistics.append(last)
        return self._maps.weighted_sum(a, b, shortcut.relu)

    def _check(self, z: Tensor) -> None:
        if z.shape != self._shape:
            raise ValueError(
                f"the block's branch gave a map of shape {tuple(z.shape)}; the maps of this stage have "
                f"{tuple(self._shape)}, so its convolutions must keep channels and size."
            )
        if z.device != self._device:
            raise ValueError(
                f"the block's branch gave a map on {z.device}; the maps of this stage are on {self._device}."
            )

    def _in_dtype(self, x: Tensor) -> Tensor:
        """`x` in the dtype of the stage, which autocast may have left: a float32 x_0 is not cast, convolutions are."""
        if x.dtype == self._dtype:
            return x
        if not torch.is_autocast_enabled(self._device.type):
            raise TypeError(
                f"the block's branch gave a map of {x.dtype}; the maps of this stage are {self._dtype}. "
                "Convert the whole stage with .to(dtype), or run it under torch.autocast."
            )
        return x.to(self._dtype)

    def _add_to_batch(self, stage: BatchStage | WholeStage, z: Tensor, bn: nn.Module, shortcut: ERShortcut) -> Tensor:
        shortcut.check_maps_filed(len(stage.maps), z)
        if all(other is not shortcut for other in self._shortcuts[len(stage.maps) - 1 : len(stage.maps)]):
            if len(stage.maps) <= len(self._shortcuts):
                raise ValueError(f"this is not the shortcut that map {len(stage.maps)} of the stage was started with.")
        norm = NO_NORM
        if is_batch_norm(bn):
            if spreads(bn) and stage.group is None:
                raise RuntimeError("an nn.SyncBatchNorm came to a stage that was started without `norms`.")
            norm = norm_arguments(bn)
        else:  # any other normalisation runs as it is, and its output is the map
            z = self._in_dtype(bn(z))
        alone = stage.group is None
        if alone and z.numel() == z.shape[1] and (norm.norm == BranchNorm.BATCH or shortcut.training):
            raise one_value(z)
        return stage.block(z, norm, shortcut.arguments(), shortcut.relu)


def _one_call_serves(x0: Tensor, shortcuts: list[ERShortcut]) -> bool:
    """True if one operator does the algebra of a block; compiled and exported programs trace plain PyTorch instead."""
    alike = all(shortcut.norm == "batch" and shortcut.eps == shortcuts[0].eps for shortcut in shortcuts)
    return alike and one_call_serves(x0)


def _unfolded(shortcuts: Iterable[ERShortcut | FoldedShortcut]) -> list[ERShortcut]:
    return [shortcut for shortcut in shortcuts if isinstance(shortcut, ERShortcut)]


def stage_group(shortcuts: Sequence[ERShortcut | FoldedShortcut], norms: Sequence[nn.Module]) -> ProcessGroup | None:
    """The processes over which a stage takes the statistics of its maps; None for this process alone.

    Raises:
        ValueError: shortcuts or BatchNorms of one stage that name different groups.
    """
    shortcuts = _unfolded(shortcuts)
    if not shortcuts or shortcuts[0].norm == "group":  # statistics of samples; a SyncBatchNorm runs as it is
        return None
    synchronised = [bn for bn in norms if isinstance(bn, nn.SyncBatchNorm)]
    groups = [shortcut.process_group for shortcut in shortcuts]
    if any(group is not None for group in groups):
        groups = [active_group(group) for group in groups] + [group_of(bn) for bn in synchronised]
    else:
        groups = [group_of(bn) for bn in synchronised]
        if any(group is not None for group in groups) and any(type(bn) is nn.BatchNorm2d for bn in norms):
            raise ValueError(
                "some blocks of this stage end in nn.SyncBatchNorm and some in nn.BatchNorm2d: convert all of them."
            )
    if any(group is not groups[0] for group in groups):
        raise ValueError("the blocks of a stage must share one process group; different ones were found.")
    by_batch = [shortcut.normalises_with_batch() for shortcut in shortcuts] + [bn.training for bn in norms]
    return groups[0] if groups and any(by_batch) else None
