"""Lightning Fabric for a run: device, precision and, under torchrun, the other processes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ernet_fast._optional import require


def is_first_process() -> bool:
    """True for the process that writes and speaks: the only one, or the first of torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


def world_size() -> int:
    """Number of processes of the run."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def build_fabric(device: str, precision: str) -> Any:
    """A launched `lightning_fabric.Fabric`; started by torchrun, it joins the other processes (DDP).

    Raises ImportError if lightning-fabric is missing, ValueError if CUDA is asked for and there is none.
    """
    fabric_module = require("lightning_fabric", extra="train", purpose="training and evaluation")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device='cuda', but torch sees no CUDA device here. Use --device cpu, or install a CUDA build of torch."
        )
    accelerator = "cpu" if device == "cpu" or not torch.cuda.is_available() else "cuda"
    arguments: dict[str, Any] = {"accelerator": accelerator, "devices": 1, "precision": precision}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if "LOCAL_RANK" in os.environ and processes > 1:
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        arguments |= {"devices": per_node, "num_nodes": processes // per_node, "strategy": "ddp"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*srun.*")
        fabric = fabric_module.Fabric(**arguments)
        fabric.launch()
    return fabric


@contextmanager
def deterministic_mode(wanted: bool) -> Iterator[None]:
    """Torch's deterministic mode for a run, a warning where it has none; without `wanted`, no change."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS demands it for reproducible products
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


Pass = Callable[[torch.Tensor], torch.Tensor]


def to_network(fabric: Any, channels_last: bool) -> Pass:
    """Function that brings images to the network's device and layout (Fabric's module takes care of the dtype)."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return lambda images: images.to(fabric.device, non_blocking=True).contiguous(memory_format=layout)


def evaluation_pass(fabric: Any, network: torch.nn.Module, channels_last: bool) -> Pass:
    """Function from images to the output of `network` in the run's precision.

    Fabric's wrapped module would exchange buffers at every call, and wait for ever where one process has a batch more.
    """
    move = to_network(fabric, channels_last)

    def forward(images: torch.Tensor) -> torch.Tensor:
        with fabric.autocast():
            return network(fabric.strategy.precision.convert_input(move(images)))

    return forward


def share_buffers(network: torch.nn.Module) -> None:
    """Give all processes the first one's buffers (running statistics), which are the ones a checkpoint holds."""
    if world_size() > 1:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)


def finish_together() -> None:
    """Wait for the other processes of a run, then leave them: one that exits early looks to the others like a crash."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
