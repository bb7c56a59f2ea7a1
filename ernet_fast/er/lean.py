"""Backward without the outputs of block epilogues: what a convolution or a ReLU would keep of them is computed again.

Every map y = ReLU(sum_l a_l * z_l + b) that an epilogue has written comes from raw maps z, which the backward pass
needs anyway, and from two small arrays. Within `lean_memory` autograd saves how to compute y in place of y. The maps
are the same bits again, so gradients are too.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ernet_fast.er import operators


class _Saved:
    """A tensor that is kept as it is."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, _version_of(tensor)

    def tensor(self) -> Tensor:
        if _version_of(self._tensor) != self._version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self._tensor.shape)} that is needed for gradients was modified in place: it "
                f"is at version {_version_of(self._tensor)}, expected {self._version}."
            )
        return self._tensor


class _Recomputed:
    """A map that is computed when it is asked for, and kept while more uses of it are expected."""

    def __init__(self, maps: list[_Saved | _Recomputed], a: Tensor, b: Tensor, relu: bool) -> None:
        self._maps, self._a, self._b, self._relu = maps, a, b, relu
        self._uses = self._left = 0  # in a backward pass over all of the graph
        self._map: Tensor | None = None

    def used_once_more(self) -> _Recomputed:
        self._uses += 1
        return self

    def tensor(self) -> Tensor:
        found = self._map  # another thread's backward pass may take it away
        if found is None:
            found = operators.weighted_sum([one.tensor() for one in self._maps], self._a, self._b, self._relu)
            self._left = self._uses
        self._left -= 1
        self._map = found if self._left > 0 else None
        return found


class _Narrowed:
    """Whole numbers, such as the indices of a pooling, in as few bytes as hold them."""

    def __init__(self, tensor: Tensor, dtype: torch.dtype) -> None:
        self._tensor = tensor.to(dtype)

    def tensor(self) -> Tensor:
        return self._tensor.long()


def _narrow_dtype(tensor: Tensor) -> torch.dtype | None:
    if tensor.dtype != torch.int64 or tensor.device.type != "cpu" or tensor.numel() < _FEW:
        return None  # elsewhere to ask for the largest would wait for the device
    least, largest = (int(end) for end in tensor.aminmax())
    for dtype in (torch.int16, torch.int32):
        if torch.iinfo(dtype).min <= least and largest <= torch.iinfo(dtype).max:
            return dtype
    return None


_FEW = 1 << 16


def _version_of(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _form_of(y: Tensor) -> tuple[Any, ...]:
    return y.dtype, y.shape, y.stride(), y.storage_offset(), _version_of(y)


class _Running:
    """The maps of one forward pass that can be computed again, by their storage."""

    def __init__(self) -> None:
        # A storage that is referred to stays another one than all others, even after its memory is released.
        self._found: dict[int, tuple[StorageWeakRef, _Recomputed, tuple[Any, ...]]] = {}

    def remember(self, y: Tensor, maps: Sequence[Tensor], a: Tensor, b: Tensor, relu: bool) -> None:
        recomputed = _Recomputed([self._recomputed(map_) or _Saved(map_.detach()) for map_ in maps], a, b, relu)
        storage = StorageWeakRef(y.untyped_storage())
        self._found[storage.cdata] = storage, recomputed, _form_of(y)

    def pack(self, tensor: Tensor) -> _Recomputed | _Saved | _Narrowed:
        if type(tensor) is Tensor and tensor.layout == torch.strided:
            recomputed = self._recomputed(tensor)
            if recomputed is not None:
                return recomputed
            dtype = _narrow_dtype(tensor)
            if dtype is not None:
                return _Narrowed(tensor, dtype)
        return _Saved(tensor)

    def close(self) -> None:
        """Let go of all maps: every saved tensor holds the hook that packed it, and that this object."""
        self._found.clear()

    def _recomputed(self, tensor: Tensor) -> _Recomputed | None:
        found = self._found.get(StorageWeakRef(tensor.untyped_storage()).cdata)
        return found[1].used_once_more() if found is not None and found[2] == _form_of(tensor) else None


class _Thread(threading.local):
    running: _Running | None = None


_THREAD = _Thread()


@contextlib.contextmanager
def lean_memory() -> Iterator[None]:
    """Have autograd keep, of what the fused operators of ER stages compute in this block, raw maps alone.

    Other hooks on saved tensors (`torch.autograd.graph.saved_tensors_hooks`, `save_on_cpu`) do not see what is saved
    inside, as only the innermost ones are called.
    """
    before, running = _THREAD.running, _Running()
    _THREAD.running = running
    try:
        with torch.autograd.graph.saved_tensors_hooks(running.pack, lambda saved: saved.tensor()):
            yield
    finally:
        _THREAD.running = before
        running.close()


def remember(y: Tensor, maps: Sequence[Tensor], a: Tensor, b: Tensor, relu: bool) -> None:
    """Within `lean_memory`: y = sum_l a_l * maps_l + b, with the ReLU if `relu`, may be computed again."""
    if _THREAD.running is not None:
        _THREAD.running.remember(y, maps, a, b, relu)
