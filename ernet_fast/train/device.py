"""Lightning Fabric for a run: device, precision and, under torchrun, the other processes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ernet_fast._optional import require


def build_fabric(device: str, precision: str) -> Any:
    """A launched `lightning_fabric.Fabric`; started by torchrun, it joins the other processes (DDP).

    Raises:
        ImportError: lightning-fabric is missing.
        ValueError: CUDA is asked for and there is none.
    """
    fabric_module = require("lightning_fabric", extra="train", purpose="training and evaluation")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device='cuda', but torch sees no CUDA device here. Use --device cpu, or install a CUDA build of torch."
        )
    accelerator = "cpu" if device == "cpu" or not torch.cuda.is_available() else "cuda"
    arguments: dict[str, Any] = {"accelerator": accelerator, "devices": 1, "precision": precision}
    if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        nodes = int(os.environ["WORLD_SIZE"]) // per_node
        arguments |= {"devices": per_node, "num_nodes": nodes, "strategy": "ddp"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*srun.*")
        fabric = fabric_module.Fabric(**arguments)
        fabric.launch()
    return fabric


def to_network(fabric: Any, channels_last: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Function that brings images to the network's device and layout (Fabric's module takes care of the dtype)."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return lambda images: images.to(fabric.device, non_blocking=True).contiguous(memory_format=layout)
