"""Batches on their way to a GPU while the one before is worked on."""

from __future__ import annotations

import atexit
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

_LAST_SECONDS = 5.0  # at the end of the interpreter, for a batch that is being read and uploaded


class Prefetcher:
    """The batches of an iterable, on `device`, uploaded ahead of their use.

    One thread takes batches from `source` and copies them to the device, by way of pinned memory and on a stream of its
    own, so that reading, upload and the work on an earlier batch overlap. A batch is handed over without waiting on the
    host: the stream that is current where it is taken waits for its copy.

    >>> for images, labels in Prefetcher(DataLoader(dataset, batch_size=256, num_workers=8), device="cuda"):
    ...     images = normalizer(images)

    On the CPU nothing is copied and no thread started: arrays become tensors over the same memory.

    Args:
        source: batches of any shapes: tensors on the CPU or NumPy arrays, in lists, tuples, named tuples and
            dictionaries of any depth; everything else, and tensors on the device, is handed on as it is. Memory formats
            and dtypes are kept. What is pinned already (`DataLoader(pin_memory=True)`) is copied once less. A source
            must not write to a batch that it gave out.
        device: where to; "cuda" is the device that is current when an iteration begins.
        depth: batches uploaded, or on their way, beside the one in use; 2 is double buffering with one in use.

    Each iteration begins `source` anew, keeps its order, and raises what `source` raises, after the batches before. One
    that is left early (`break`, an exception, `close()`) stops the thread, and closes the iterator of `source`.

    Raises:
        TypeError: `source` is not iterable, or depth no integer.
        ValueError: depth below 1, or a device that is neither a CPU nor a CUDA device.
        RuntimeError: a CUDA device, but torch sees none; while iterating, a tensor on another device.
    """

    def __init__(self, source: Iterable[Any], device: str | torch.device = "cuda", depth: int = 2) -> None:
        if not hasattr(source, "__iter__") and not hasattr(source, "__getitem__"):
            raise TypeError(f"source is a {type(source).__name__}; expected an iterable of batches, e.g. a DataLoader.")
        if isinstance(depth, bool) or not isinstance(depth, int):
            raise TypeError(f"depth is {depth!r}; expected an integer.")
        if depth < 1:
            raise ValueError(f"depth={depth}; at least one batch has to be under way.")
        self.source, self.device, self.depth = source, torch.device(device), depth
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"device={str(device)!r}; expected 'cuda', 'cuda:N' or 'cpu'.")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"device={str(device)!r}, but torch sees no CUDA device here; pass device='cpu'.")

    def __len__(self) -> int:
        """Number of batches, where `source` has one."""
        return len(self.source)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        """Begin `source` anew."""
        if self.device.type == "cpu":
            return (map_arrays(batch, as_tensor) for batch in self.source)
        device = self.device if self.device.index is not None else torch.device("cuda", torch.cuda.current_device())
        return prefetch(self.source, CopyLane(device), self.depth)


class CopyLane:
    """A stream for copies from the host to a CUDA device, beside the stream that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def upload(self, array: torch.Tensor) -> torch.Tensor:
        """Begin to copy a tensor to the device; returns the tensor that it will be."""
        if array.device == self.device:
            return array
        if array.device.type != "cpu":
            raise RuntimeError(f"a batch holds a tensor on {array.device}; expected the CPU, or {self.device}.")
        dense = torch.empty_like(array, device="meta").stride() == array.stride()  # one stretch of memory
        staged = array if dense and array.is_pinned() else page_locked(array)
        with torch.cuda.stream(self.stream):
            return staged.to(self.device, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        """An event behind all copies begun so far."""
        event = torch.cuda.Event()
        event.record(self.stream)
        return event

    def hand_over(self, arrays: list[torch.Tensor], copied: torch.cuda.Event) -> None:
        """Let the current stream wait for the copies, and keep the memory until that stream has done with it."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        for array in arrays:
            array.record_stream(current)


def page_locked(array: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """A dense copy in pinned memory, in the same memory format; torch reuses it after the copies from it are done."""
    return torch.empty_like(array, device="cpu", pin_memory=True).copy_(array, non_blocking=non_blocking)


def to_host(arrays: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.cuda.Event | None]:
    """Begin to copy tensors to page-locked memory; the event says when they are there. CPU tensors are given back."""
    if not any(array.is_cuda for array in arrays):
        return arrays, None
    copies = [page_locked(array, non_blocking=True) for array in arrays]
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(arrays[0].device))
    return copies, event


def prefetch(source: Iterable[Any], lane: CopyLane, depth: int) -> Iterator[Any]:
    """Yield the batches of `source` that `lane` uploads, at most `depth` of them ahead of the one in use."""
    ready: queue.SimpleQueue[Any] = queue.SimpleQueue()  # what _upload returns; last an error, or None
    places = threading.Semaphore(depth)
    stop = threading.Event()

    def fill() -> None:
        """The thread: upload one batch for each place, until the source ends or the iteration is left."""
        error: BaseException | None = None
        batches: Iterator[Any] | None = None
        try:
            batches = iter(source)
            while places.acquire() and not stop.is_set():
                ready.put(_upload(next(batches), lane))
        except StopIteration:
            pass
        except BaseException as caught:  # whatever it is, it belongs to the thread that iterates
            error = caught
        try:
            getattr(batches, "close", lambda: None)()
        except BaseException as caught:
            error = error or caught
        ready.put(error)

    thread = threading.Thread(target=fill, name="ernet_fast-prefetch", daemon=True)
    thread.start()

    def end() -> None:
        stop.set()
        places.release()
        # A thread cannot end any more once the interpreter does, nor wait for itself (in a garbage collection).
        if thread is not threading.current_thread() and not sys.is_finalizing():
            thread.join(patience)

    patience: float | None = _LAST_SECONDS
    # A thread that is within C++ code when the interpreter ends takes the process down; one whose source keeps it
    # waiting does not, and is waited for a few seconds at most.
    atexit.register(end)
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            handed, arrays, copied = item
            lane.hand_over(arrays, copied)
            places.release()
            del item, arrays, copied  # the caller alone holds a batch while it works on it
            yield handed.pop()
    finally:
        atexit.unregister(end)
        patience = None
        end()


def _upload(batch: Any, lane: CopyLane) -> tuple[list[Any], list[torch.Tensor], Any]:
    """The batch, in a list of its own, the tensors that are copied, and an event behind the copies."""
    arrays: list[torch.Tensor] = []

    def one(leaf: Any) -> torch.Tensor:
        array = as_tensor(leaf)
        on_device = lane.upload(array)
        if on_device is not array:
            arrays.append(on_device)
        return on_device

    return [map_arrays(batch, one)], arrays, lane.mark()


def as_tensor(leaf: torch.Tensor | np.ndarray) -> torch.Tensor:
    """A tensor over the memory of an array; copied where torch cannot look at it (read-only, negative strides)."""
    if isinstance(leaf, torch.Tensor):
        return leaf
    if not leaf.flags.writeable or any(stride < 0 for stride in leaf.strides):
        leaf = leaf.copy()
    return torch.from_numpy(leaf)


def map_arrays(batch: Any, function: Callable[[Any], torch.Tensor]) -> Any:
    """`batch` with every tensor and numeric array replaced by what `function` makes of it."""
    if isinstance(batch, torch.Tensor) or (isinstance(batch, np.ndarray) and batch.dtype.kind in "biufc"):
        return function(batch)
    if isinstance(batch, dict):
        return type(batch)({key: map_arrays(value, function) for key, value in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_make"):
        return batch._make(map_arrays(value, function) for value in batch)
    if type(batch) in (list, tuple):
        return type(batch)(map_arrays(value, function) for value in batch)
    return batch
