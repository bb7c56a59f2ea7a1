"""One stage during one forward pass: the path on which it is computed, and the maps that its blocks leave and read.

The path is chosen once, when x_0 comes, from everything that decides (`choose`), and holds for all blocks and for the
backward pass, so that compiled and eager blocks, or a hook on one of them, cannot make a stage of two halves.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ernet_fast import _backend
from ernet_fast.er import epilogue, operators
from ernet_fast.er.epilogue_arguments import NO_NORM, BranchNorm, norm_arguments
from ernet_fast.er.nodes import FusedStage
from ernet_fast.er.plain import is_plain, why_not_plain
from ernet_fast.er.process_group import NO_NAIVE_GROUP, ProcessGroup, active_group, group_of
from ernet_fast.er.shortcut import ERShortcut
from ernet_fast.er.traceable_stage import TraceableStage

_LOG = logging.getLogger("ernet_fast.er")
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class Path(enum.Enum):
    """How the epilogues of a stage's blocks are computed."""

    BLOCK_OPERATOR = "one operator a block each way"
    COMPOSED = "one operator a step"
    TRACEABLE = "operators that are traced or differentiated one by one"
    MODULES = "the modules, one after the other"


class Choice(NamedTuple):
    """A stage's path, why it was chosen, and over which processes statistics are taken."""

    path: Path
    reason: str
    group: ProcessGroup | None = None


class StageModules(NamedTuple):
    """The modules of a stage's ER blocks whose arithmetic their epilogues stand for, one entry a block."""

    shortcuts: list[Any]  # ERShortcut, FoldedShortcut, or whatever somebody has put in its place
    norms: list[nn.Module]
    relus: list[nn.Module]


def choose(x0: Tensor, modules: StageModules, *, fused: bool) -> Choice:
    """The path of a stage whose first map is `x0`, or one like it.

    Raises:
        RuntimeError: statistics over processes, which only fused paths take.
        ValueError: modules that name different process groups.
    """
    shortcuts = modules.shortcuts
    for shortcut in shortcuts:
        if not isinstance(shortcut, ERShortcut):
            folded = "folded for inference: each shortcut is one weighted sum, its coefficients stored"
            return Choice(Path.MODULES, folded)
    group = statistics_group(modules)
    reason = _why_modules(x0, modules, fused=fused, empty_allowed=group is not None)
    if reason is not None:
        choice = Choice(Path.MODULES, reason)
    elif torch.compiler.is_compiling():
        choice = Choice(Path.TRACEABLE, "compiled or exported programs trace operators")
    elif len({shortcut.eps for shortcut in shortcuts}) > 1:
        choice = Choice(Path.TRACEABLE, "the shortcuts of the stage differ in eps")
    elif epilogue.block_operator_supports(x0, group):
        choice = Choice(Path.BLOCK_OPERATOR, "compiled operators for the CPU")
    elif group is None:
        choice = Choice(Path.COMPOSED, "Triton's operators")
    else:
        choice = Choice(Path.COMPOSED, "statistics over a process group: collectives between steps", group)
    if group is not None and choice.group is None:
        raise RuntimeError(f"{NO_NAIVE_GROUP} Here: {choice.reason}.")
    return choice


def _why_modules(x0: Tensor, modules: StageModules, *, fused: bool, empty_allowed: bool) -> str | None:
    """Why the stage must be computed by its modules; None if it need not."""
    if not fused:
        return "fused=False"
    reason = operators.why_plain(x0)
    if reason is not None:
        if not operators.COMPILED and isinstance(x0, Tensor) and x0.device.type == "cpu":
            _backend.warn_fallback_once()
        return reason
    if x0.numel() == 0 and not empty_allowed:
        return "the maps are empty"
    first = modules.shortcuts[0]
    for shortcut in modules.shortcuts:
        if shortcut.norm != first.norm or shortcut.num_groups != first.num_groups:
            return "the shortcuts of the stage normalise in different ways"
    pairs: list[Any] = []
    for relu in modules.relus:
        pairs += (relu, nn.ReLU)
    for shortcut in modules.shortcuts:
        pairs += (shortcut, ERShortcut)
        if shortcut.statistics is not None:
            pairs += (shortcut.statistics, _BATCH_NORMS)
    if is_plain(*pairs):
        return None
    for module, kind in zip(pairs[::2], pairs[1::2], strict=True):
        why = why_not_plain(module, kind)
        if why is not None:
            what = kind.__name__ if isinstance(kind, type) else "BatchNorm of a shortcut"
            return f"a module of an epilogue is not plain: the {what} {why}"
    raise AssertionError("every module is plain")


def statistics_group(modules: StageModules) -> ProcessGroup | None:
    """The processes over which a stage takes the statistics of its maps; None for this process alone.

    Raises:
        ValueError: shortcuts or BatchNorms of one stage that name different groups.
    """
    shortcuts, norms = modules.shortcuts, modules.norms
    if not isinstance(shortcuts[0], ERShortcut) or shortcuts[0].norm == "group":
        return None  # statistics of samples; SyncBatchNorm runs as it is
    named, synchronised = False, []
    for bn in norms:
        if isinstance(bn, nn.SyncBatchNorm):
            synchronised.append(bn)
    for shortcut in shortcuts:
        named |= shortcut.process_group is not None
        if isinstance(shortcut.statistics, nn.SyncBatchNorm):
            synchronised.append(shortcut.statistics)
    if not (synchronised or named):
        return None
    groups = [group_of(bn) for bn in synchronised]
    if named:
        groups += [active_group(shortcut.process_group) for shortcut in shortcuts]
    elif any(group is not None for group in groups) and any(type(bn) is nn.BatchNorm2d for bn in norms):
        raise ValueError(
            "some blocks of this stage end in nn.SyncBatchNorm and some in nn.BatchNorm2d: convert all of them."
        )
    if any(group is not groups[0] for group in groups):
        raise ValueError("the blocks of a stage must share one process group; different ones were found.")
    by_batch = any(shortcut.normalises_with_batch() for shortcut in shortcuts) or any(bn.training for bn in norms)
    return groups[0] if groups and by_batch else None


class StageMaps:
    """The maps x_0 ... x_l of one stage in one forward pass, made anew by each `ERStage.forward`."""

    def __init__(self, *, fused: bool, fuses_norms: bool = False) -> None:
        """Prepare for a forward pass.

        Args:
            fused: False is the naive composition.
            fuses_norms: the BatchNorms inside the branches may be one pass with the ReLU behind them.
        """
        self.fused, self.fuses_norms = fused, fuses_norms
        self.choice: Choice
        self._modules: StageModules
        self._stage: FusedStage | TraceableStage | None = None
        self._xs: list[Tensor] = []  # where the modules compute them
        self._filed = 0

    def start(
        self, x0: Tensor, shortcuts: Sequence[Any], norms: Sequence[nn.Module] = (), relus: Sequence[nn.Module] = ()
    ) -> Tensor:
        """Choose the path, and file x_0, the output of the projection block.

        Args:
            x0: [N, C, H, W], after its ReLU.
            shortcuts: those of the blocks to come.
            norms: the last normalisations of those blocks' branches: with `nn.SyncBatchNorm` the statistics of all maps
                are taken over the processes of its group.
            relus: the ReLUs of those blocks; without, every one is plain.

        Returns:
            The tensor to feed to the next block.
        """
        shortcuts = list(shortcuts)
        modules = StageModules(shortcuts, list(norms), list(relus))
        choice = choose(x0, modules, fused=self.fused)
        self.choice, self._modules = choice, modules
        if not torch.compiler.is_compiling() and _LOG.isEnabledFor(logging.DEBUG):
            _LOG.debug("stage of %s: %s (%s)", tuple(x0.shape), choice.path.value, choice.reason)
        # of the maps to come, only what they must have in common with x_0; the map itself is not kept here
        self._shape, self._dtype, self._device = x0.shape, x0.dtype, x0.device
        self._filed = 1
        if choice.path is Path.MODULES:
            self._xs.append(x0)
            return x0
        first = shortcuts[0]
        measure = first.norm == "group"
        for shortcut in shortcuts:
            measure |= shortcut.normalises_with_batch()
        if choice.path is Path.TRACEABLE:
            self._stage = TraceableStage(num_groups=first.num_groups, eps=first.eps, measure=measure)
        else:
            self._stage = FusedStage(
                [shortcut.weight for shortcut in shortcuts],
                eps=first.eps,
                measure=measure,
                num_groups=first.num_groups or 0,
                composed=choice.path is Path.COMPOSED,
                group=choice.group,
            )
        return self._stage.start(x0)

    def add(self, z: Tensor, bn: nn.Module | None, shortcut: Any, relu: nn.Module | None = None) -> Tensor:
        """File the output z of a branch and return the block's output.

        Args:
            z: [N, C, H, W], output of the branch's last convolution, before its normalisation.
            bn: that normalisation, usually `nn.BatchNorm2d`; None if z has had it, and is the map.
            shortcut: the block's weights, one row for each map filed before.
            relu: the block's ReLU; None for a plain one.

        Returns:
            y = ReLU(bn(z) + sum_i weight_i * N(x_i)), [N, C, H, W].

        Raises:
            ValueError: z, or the number of maps filed, does not fit; no statistics have been updated then.
            TypeError: z has another dtype than x_0, outside autocast, under which it is converted.
        """
        stage = self._stage
        if torch.compiler.is_compiling() and not (stage is None or isinstance(stage, TraceableStage)):
            return self._add_uncompiled(z, bn, shortcut, relu)
        self._check(z)
        collapses = stage is not None and bn is not None and is_plain(bn, _BATCH_NORMS)
        if collapses or type(bn) in _BATCH_NORMS:
            z = self._in_dtype(z)
        if collapses and isinstance(bn, nn.SyncBatchNorm) and bn.training and group_of(bn) is not None:
            collapses = self.choice.group is not None
            if not collapses and self._modules.shortcuts[0].norm == "batch":
                raise RuntimeError("an nn.SyncBatchNorm came to a stage that was started without `norms`.")
        if isinstance(shortcut, ERShortcut):
            shortcut.check_maps_filed(self._filed, z)
        if stage is None:
            self._xs.append(self._in_dtype(z if bn is None else bn(z)))
            self._filed += 1
            return self._by_modules(shortcut, relu)
        expected = self._modules.shortcuts
        if self._filed > len(expected):
            raise ValueError(f"the stage was started with shortcuts for {len(expected) + 1} maps; this is one more.")
        if shortcut is not expected[self._filed - 1]:
            raise ValueError(f"this is not the shortcut that map {self._filed} of the stage was started with.")
        if not collapses:  # any other normalisation runs as it is, and its output is the map
            z = self._in_dtype(z if bn is None else bn(z))
        self._filed += 1
        norm = norm_arguments(bn) if collapses and bn is not None else NO_NORM
        if isinstance(stage, FusedStage) and self.choice.group is None and z.numel() == z.shape[1]:
            if norm.norm == BranchNorm.BATCH or shortcut.normalises_with_batch():
                raise operators.one_value(z)
        return stage.block(z, norm, shortcut.arguments(), relu=shortcut.relu)

    # The stage's own nodes are not traced: a compiled block of an eager stage breaks its graph here.
    _add_uncompiled = _disable_dynamo(add)

    def _by_modules(self, shortcut: Any, relu: nn.Module | None) -> Tensor:
        if relu is None or is_plain(relu, nn.ReLU) or not shortcut.relu:
            return shortcut(self._xs, fused=self.fused)
        y: Tensor = relu(shortcut(self._xs, fused=self.fused, relu=False))
        return y

    def _check(self, z: Tensor) -> None:
        if not isinstance(z, Tensor) or torch.jit.is_tracing():  # no shape to look at, or one that is traced
            return
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
        if not isinstance(x, Tensor) or x.dtype == self._dtype:
            return x
        if not torch.is_autocast_enabled(self._device.type):
            raise TypeError(
                f"the block's branch gave a map of {x.dtype}; the maps of this stage are {self._dtype}. "
                "Convert the whole stage with .to(dtype), or run it under torch.autocast."
            )
        return x.to(self._dtype)
