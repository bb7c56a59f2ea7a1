"""`torch.cuda.CUDAGraph` without a GPU: operators are recorded while they are captured, and run again by a replay.

As on a GPU, a capture runs nothing: what it changed is put back, and its results hold NaN until the first replay, which
sees the same memory and none of the Python.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FORBIDDEN = {"aten::_local_scalar_dense", "aten::nonzero", "aten::_pin_memory"}
"""Operators that wait for the device or read memory of the host."""


class RecordedGraph:
    """Operators with their arguments and results, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, kept in self.calls:
                found = func(*args, **kwargs)
                if any(r.alias_info for r in func._schema.returns):  # a view, or what was changed in place
                    continue
                for old, new in zip(tree_leaves(kept), tree_leaves(found), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


class Capture(TorchDispatchMode):
    """Stands in for `torch.cuda.graph(graph)`."""

    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph
        self.made: set[int] = set()
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func._schema.name not in FORBIDDEN, f"{func} waits for the device"
        for parameter, value in zip(func._schema.arguments, args, strict=False):
            if parameter.alias_info is not None and parameter.alias_info.is_write:
                self._keep(value)
        out = func(*args, **kwargs)
        self.graph.calls.append((func, args, kwargs, out))
        if not any(r.alias_info for r in func._schema.returns):
            self.made |= {t.untyped_storage()._cdata for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        return out

    def _keep(self, value: Any) -> None:
        for t in tree_leaves(value):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.made:
                self.before.setdefault(id(t), (t, t.clone()))

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        with torch.no_grad():
            for t, before in self.before.values():
                t.copy_(before)
            for func, _, _, out in self.graph.calls:
                if not any(r.alias_info for r in func._schema.returns):
                    for t in tree_leaves(out):
                        if isinstance(t, torch.Tensor) and t.is_floating_point():
                            t.fill_(torch.nan)


class _Stream:
    def wait_stream(self, other: Any) -> None:
        """Everything runs in order."""


@contextlib.contextmanager
def recorded_graphs() -> Iterator[None]:
    """The CPU stands for a CUDA device."""
    with contextlib.ExitStack() as stack:
        for name, value in (
            ("Stream", _Stream),
            ("current_stream", _Stream),
            ("stream", lambda stream: contextlib.nullcontext()),
            ("device", lambda device: contextlib.nullcontext()),
            ("CUDAGraph", RecordedGraph),
            ("graph", Capture),
        ):
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for module in ("models.inference", "train.graphed_step"):
            stack.enter_context(mock.patch(f"ernet_fast.{module}.check_on_cuda", lambda what, tensors: None))
        yield
