"""Notices a loss that is no longer a number, without making a GPU wait at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GPU_INTERVAL = 20
"""Steps between two looks at the losses on a GPU; on the CPU every step is looked at."""


class TrainingDivergedError(RuntimeError):
    """The loss became NaN or infinite; the message says at which step and what to try."""


class LossWatch:
    """Collects an epoch's losses and raises at the first that is not finite, naming its step."""

    def __init__(self, fabric: Any, epoch: int, first_step: int, advice: str) -> None:
        self._fabric, self._epoch, self._first, self._advice = fabric, epoch, first_step, advice
        self._interval = 1 if fabric.device.type == "cpu" else GPU_INTERVAL
        self._pending: list[tuple[Tensor, int]] = []
        self._steps, self._sum, self._images = 0, 0.0, 0
        self.last: float | None = None  # the newest loss that was looked at

    def add(self, loss: Tensor, count: int) -> None:
        """The mean loss of one step's `count` images."""
        self._pending.append((loss.detach().float(), count))
        if len(self._pending) >= self._interval:
            self._look()

    def mean(self) -> float:
        """Mean loss of the epoch's images so far, over all processes."""
        self._look()
        totals = torch.tensor([self._sum, float(self._images)], dtype=torch.float64, device=self._fabric.device)
        if self._fabric.world_size > 1:
            totals = self._fabric.all_reduce(totals, reduce_op="sum")
        return float(totals[0] / totals[1])

    def _look(self) -> None:
        if not self._pending:
            return
        losses = torch.stack([loss for loss, _ in self._pending])
        bad = (~losses.isfinite()).float()
        if self._fabric.world_size > 1:  # all processes must stop together: one that went on would wait for ever
            bad = self._fabric.all_reduce(bad, reduce_op="sum")
        values = losses.tolist()
        for value, flag, (_, count) in zip(values, bad.tolist(), self._pending, strict=True):
            self._steps += 1
            if flag:
                raise TrainingDivergedError(
                    f"the loss is {value} at step {self._first + self._steps} (epoch {self._epoch}). The last good "
                    f"checkpoint is kept. {self._advice}"
                )
            self._sum += value * count
            self._images += count
        self.last = values[-1]
        self._pending = []
