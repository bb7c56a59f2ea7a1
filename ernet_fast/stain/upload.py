"""Small values from the host to a GPU that is busy: without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_device(values: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`values` on `device`, in `dtype` if given.

    From the CPU to a GPU they are staged through pinned memory: a copy from pageable memory would wait for all work of
    the device. While a CUDA graph is captured nothing may be uploaded, as its replays would read memory that is no
    longer theirs: pass stains that are on the device already.
    """
    if values.device.type == "cpu" and device.type == "cuda" and not values.requires_grad:
        values = values if dtype is None else values.to(dtype)
        # Dense: torch stages anything else through pageable memory.
        return values.contiguous().pin_memory().to(device, non_blocking=True)
    return values.to(device) if dtype is None else values.to(device, dtype)


def index_on(index: Sequence[int], device: torch.device) -> torch.Tensor:
    """Row numbers as a tensor on `device`: indexing with a list would make one and wait for it."""
    return to_device(torch.tensor(index, device="cpu"), device)


def is_readable(values: torch.Tensor) -> bool:
    """True if the values may be looked at: on the CPU, neither traced nor wrapped by a transform of torch.func."""
    return (
        values.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(values) in (torch.Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(values)
    )
