"""Bytes that a pass moves, operator by operator.

Hardware counters of memory traffic are rarely there (virtual machines hide them), and they would count what the caches
saved besides. This is the count of a machine whose caches hold nothing from one operator to the next: every tensor that
an operator reads or writes counts once. An operator that passes twice over its argument, as a batch norm does, counts
once, so the figure is a lower bound for compositions of many operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# operators that take the shape of a tensor, and none of its elements
SHAPE_ONLY = ("aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::new_zeros", "aten::new_ones")
ALLOCATION = ("aten::empty", "aten::new_empty")
OVERWRITE = ("aten::copy_", "aten::fill_", "aten::zero_", "aten::normal_")


class Traffic(TorchDispatchMode):
    """While active, counts what operators do that read or write a tensor: no views, no allocations.

    Args:
        ignore: prefixes of names of operators that count for nothing.

    Attributes:
        read, written: bytes.
    """

    def __init__(self, ignore: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.ignored = (*ALLOCATION, *ignore)
        self.read = self.written = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if not func._schema.name.startswith(self.ignored):
            self._count(func._schema, args, kwargs or {}, results)
        return results

    def _count(self, schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: Any) -> None:
        given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
        reads: dict[Any, Tensor] = {}
        writes: dict[Any, Tensor] = {}
        for argument in schema.arguments:
            mutated = argument.alias_info is not None and argument.alias_info.is_write
            tensors = {_key(tensor): tensor for tensor in _tensors(given.get(argument.name))}
            writes |= tensors if mutated else {}
            reads |= {} if mutated and (schema.name in OVERWRITE or argument.is_out) else tensors
        known = {tensor.untyped_storage()._cdata for tensor in _tensors([args, kwargs])}
        writes |= {_key(new): new for new in _tensors(results) if new.untyped_storage()._cdata not in known}
        if not writes:  # a view
            return
        if schema.name.startswith(SHAPE_ONLY):
            reads = {}
        self.read += sum(map(_bytes, reads.values()))
        self.written += sum(map(_bytes, writes.values()))


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Bytes of the tensor's distinct elements: broadcast dimensions, of stride 0, count once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= 1 if stride == 0 and size > 0 else size
    return count


def _key(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), _bytes(tensor)


def bytes_moved(call: Callable[[], Any], ignore: tuple[str, ...] = ()) -> int:
    """Bytes that the operators of a call, its backward pass included, read and write."""
    with Traffic(ignore) as traffic:
        call()
    return traffic.read + traffic.written
