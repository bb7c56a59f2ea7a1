"""Small values from the host to a GPU that is busy: without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_device(values: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`values` on `device`, in `dtype` if given.

    From the CPU to a GPU they go by way of page-locked memory: a copy from ordinary memory would wait for all work that
    the device has. While a CUDA graph is captured nothing may be uploaded, as its replays would read memory that is no
    longer theirs: pass stains that are on the device already.
    """
    if values.device.type == "cpu" and device.type == "cuda" and not values.requires_grad:
        values = values if dtype is None else values.to(dtype)
        # Dense: torch copies anything else by way of ordinary memory.
        return values.contiguous().pin_memory().to(device, non_blocking=True)
    return values.to(device) if dtype is None else values.to(device, dtype)


def index_on(index: Sequence[int], device: torch.device) -> torch.Tensor:
    """Row numbers as a tensor on `device`: indexing with a list would make one and wait for it."""
    return to_device(torch.tensor(index), device)
