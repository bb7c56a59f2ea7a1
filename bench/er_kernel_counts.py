"""How many kernels the block epilogues of a stage run, forward and backward: counted by the profiler, not by hand.

A kernel is an operator that does work itself: no view, no allocation, no operator that only calls others. It is a
*map kernel* if one of its tensors is as large as a map, and a *vector kernel* if its tensors are per-channel vectors,
or stacks of them; operators on single numbers are not counted. What torch.compile makes of the naive composition is
counted by Inductor: its loop nests after fusion, and the bytes that they access.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from er_stage_epilogues import EpilogueMaps, EpilogueStage, train_epilogues
from tensor_memory import no_kept_memory


class Kernels(NamedTuple):
    """Kernels of a pass that touch a map, and those that touch vectors only."""

    map: int
    vector: int

    @property
    def total(self) -> int:
        return self.map + self.vector


@functools.cache
def _moves_data(name: str) -> bool:
    """True for operators that write a tensor: not for views, allocations, queries and what is no operator."""
    if "::" not in name or name.startswith(("aten::empty", "aten::new_", "ernet_bench::")):
        return False
    schemas = torch._C._jit_get_schemas_for_operator(name)
    returns = [result for schema in schemas for result in schema.returns if "Tensor" in str(result.type)]
    return any(result.alias_info is None or result.alias_info.is_write for result in returns)


def _shapes(event: Any) -> Iterator[list[int]]:
    """Shapes of an operator's arguments, and of what it allocates."""
    yield from (shape for shape in event.input_shapes if shape and all(isinstance(size, int) for size in shape))
    for child in event.cpu_children:
        if not _moves_data(child.name):
            yield from _shapes(child)


def _count(event: Any, map_size: int) -> Kernels:
    inner = [_count(child, map_size) for child in event.cpu_children]
    found = Kernels(sum(kernels.map for kernels in inner), sum(kernels.vector for kernels in inner))
    if not _moves_data(event.name):
        return found
    sizes = [math.prod(shape) for shape in _shapes(event)]
    if max(sizes, default=0) >= map_size:
        return Kernels(max(1, found.map), found.vector)
    if max(sizes, default=0) > 1:
        return Kernels(found.map, max(1, found.vector))
    return found


def profiled_kernels(call: Callable[[], Any], map_size: int) -> Kernels:
    """Kernels of `call`, its backward pass included; a map has `map_size` elements."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with no_kept_memory():  # the profiler has no shapes of lists of maps: what an operator allocates tells its size
        call()
        with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profile:
            call()
    counts = [_count(event, map_size) for event in profile.events() if event.cpu_parent is None]
    return Kernels(sum(kernels.map for kernels in counts), sum(kernels.vector for kernels in counts))


class CompiledCost(NamedTuple):
    """Loop nests of a compiled pass, and the bytes that they access, by Inductor's own count."""

    kernels: Kernels
    bytes_moved: int


@contextmanager
def _inductor_counts() -> Iterator[Any]:
    """While active, everything is compiled anew and counted; Inductor counts only where its metrics are logged."""
    from torch._inductor import compile_fx, metrics
    from torch._inductor import config as inductor

    log = compile_fx.inductor_metrics_log
    level, propagate, handlers = log.level, log.propagate, log.handlers
    torch._dynamo.reset()
    metrics.reset()
    try:
        log.handlers, log.propagate = [logging.NullHandler()], False
        log.setLevel(logging.INFO)
        with inductor.patch(force_disable_caches=True):
            yield metrics
    finally:
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)
        torch._dynamo.reset()


def compiled_cost(stage: EpilogueStage, maps: EpilogueMaps) -> CompiledCost:
    """What torch.compile makes of forward + backward of `stage`. Compiles without a cache, which takes a while."""
    map_size = maps.zs[0].numel()
    with _inductor_counts() as metrics:
        train_epilogues(torch.compile(stage), maps)
        # a node of Inductor's schedule is a loop nest, or a call of another operator: here, the stand-in of a branch;
        # the number beside it is what it accesses, in units of four bytes
        accesses = [count for node, count in metrics.nodes_num_elem if not node.is_extern()]
    unit = maps.zs[0].element_size()
    whole = sum(4 * count >= map_size * unit for count in accesses)
    return CompiledCost(Kernels(whole, len(accesses) - whole), 4 * sum(accesses))
