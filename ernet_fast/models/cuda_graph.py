"""Calls captured as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

_WARM_UP_CALLS = 3
T = TypeVar("T")


def check_on_cuda(what: str, tensors: Iterable[Tensor]) -> None:
    """RuntimeError unless all of `tensors` are on one CUDA device, as `what` needs them."""
    devices = {t.device for t in tensors}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        reason = "" if torch.cuda.is_available() else ", and this torch finds no CUDA device"
        raise RuntimeError(f"{what} on a CUDA device; it is on {', '.join(sorted(map(str, devices)))}{reason}.")


def capture(call: Callable[[], T], device: torch.device, between: Callable[[], object] | None = None) -> tuple[Any, T]:
    """A CUDA graph of `call`, and what `call` returned, which each replay writes anew.

    Args:
        call: works on CUDA tensors that stay where they are, and copies nothing from or to the host.
        device: of these tensors.
        between: undoes what the calls before the capture have changed.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # convolution algorithms and Triton kernels are chosen before the capture
            for _ in range(_WARM_UP_CALLS):
                call()
            if between is not None:
                between()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
    return graph, result
