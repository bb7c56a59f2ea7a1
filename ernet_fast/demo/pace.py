"""How many epochs this machine has time for."""

from __future__ import annotations

import statistics
import time

import torch
from torch.nn import functional as F

from ernet_fast.train.config import TrainConfig
from ernet_fast.train.network import build_network

MOST_EPOCHS, FEWEST_EPOCHS = 8, 2
_OVERHEAD = 1.25
"""Time of an epoch over the time of its training steps: reading, augmentation, validation, checkpoints."""


def affordable_epochs(settings: TrainConfig, images: int, seconds: float) -> int:
    """Epochs over `images` images that fit into `seconds`, 2 to 8, by the median of two training steps."""
    device = torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")
    state = torch.get_rng_state()
    network = build_network(settings, 2).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shape = (settings.batch_size, 3, settings.image_size, settings.image_size)
    batch = torch.randn(shape).to(device).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(settings.batch_size, dtype=torch.int64, device=device)
    torch.set_rng_state(state)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        F.cross_entropy(network(batch), labels).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    steps = max(1, images // settings.batch_size)
    epoch = _OVERHEAD * steps * statistics.median(times[1:])
    return max(FEWEST_EPOCHS, min(MOST_EPOCHS, int(seconds / epoch)))
