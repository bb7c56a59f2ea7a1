"""Bytes that a pass moves, operator by operator: every tensor that one reads or writes counts once.

Hardware counters of memory traffic are rarely there (virtual machines hide them), and they would count what the caches
saved besides. This is the count of a machine whose caches hold nothing from one operator to the next: what each
operator must read and write to do its work at all. An operator that passes twice over its argument, as a batch norm
does, counts once, so the figure is a lower bound for compositions of many operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# operators that take the shape of a tensor, and none of its elements
SHAPE_ONLY = ("aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::new_zeros", "aten::new_ones")


def _tensors(values: Any) -> Iterable[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Bytes of the tensor's distinct elements: broadcast dimensions, of stride 0, count once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= 1 if stride == 0 and size > 0 else size
    return count


def _key(tensor: Tensor) -> tuple[int, int, int]:
    """The memory of a tensor."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), _bytes(tensor)


class Traffic(TorchDispatchMode):
    """While active, counts the bytes that operators read and write, and the operators that move a map.

    Args:
        least_bytes: what a tensor has at least whose operators are counted.
        ignore: prefixes of names of operators that count for nothing.

    Attributes:
        read: bytes read.
        written: bytes written.
        operators: operators that read or wrote at least `least_bytes` in one tensor.
    """

    def __init__(self, least_bytes: int = 1, ignore: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.least_bytes, self.ignore = least_bytes, ignore
        self.read = self.written = self.operators = 0

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        self._count(func._schema, args, kwargs or {}, results)
        return results

    def _count(self, schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: Any) -> None:
        given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
        reads: dict[Any, int] = {}
        writes: dict[Any, int] = {}
        outputs_only = schema.name in ("aten::copy_", "aten::fill_", "aten::zero_", "aten::normal_")
        for argument in schema.arguments:
            mutated = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(given.get(argument.name)):
                if mutated:
                    writes[_key(tensor)] = _bytes(tensor)
                if not (mutated and (outputs_only or argument.is_out)):
                    reads[_key(tensor)] = _bytes(tensor)
        inputs = {tensor.untyped_storage()._cdata for tensor in _tensors([args, kwargs])}
        new = [tensor for tensor in _tensors(results) if tensor.untyped_storage()._cdata not in inputs]
        if not new and not writes:  # a view
            return
        if schema.name.startswith(("aten::empty", "aten::new_empty", *self.ignore)):  # allocation writes nothing
            return
        writes |= {_key(tensor): _bytes(tensor) for tensor in new}
        if schema.name.startswith(SHAPE_ONLY):
            reads = {}
        self.read += sum(reads.values())
        self.written += sum(writes.values())
        self.operators += max([*reads.values(), *writes.values()], default=0) >= self.least_bytes


def bytes_moved(call: Callable[[], Any], ignore: tuple[str, ...] = ()) -> int:
    """Bytes that the operators of a call, its backward pass included, read and write."""
    with Traffic(ignore=ignore) as traffic:
        call()
    return traffic.moved
