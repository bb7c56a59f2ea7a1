"""Notices a loss that is no longer a number, without making a GPU wait at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

GPU_INTERVAL = 20
"""Steps between two looks at the losses on a GPU; on the CPU every step is looked at."""


_NAMED = 10  # file names in an error before "and N more"


class TrainingDivergedError(RuntimeError):
    """The loss became NaN or infinite; the message says at which step, of which images, and what to try."""


class Totals(NamedTuple):
    """Of the batches of an epoch so far: sum of the losses of all images, number of images."""

    loss: float = 0.0
    images: int = 0


class _Batch(NamedTuple):
    loss: Tensor
    where: Tensor  # positions of its images
    finite: Tensor  # of each image, whether the network's output is


class LossWatch:
    """Collects an epoch's losses, raises at the first that is not finite, and agrees with other processes when to stop.

    Args:
        fabric: of the run.
        place: step and epoch as words, e.g. "step {step} (epoch 3)"; `step` is counted from `first_step` + 1.
        first_step: batches before those that are added.
        advice: last sentence of the error.
        name_of: the file name of the image at a position.
        wants_to_stop: whether this process was asked to end.
        totals: of the epoch's batches that an interrupted run did before.
    """

    def __init__(
        self,
        fabric: Any,
        place: str,
        first_step: int,
        advice: str,
        name_of: Callable[[int], str],
        *,
        wants_to_stop: Callable[[], bool] = lambda: False,
        totals: Totals = Totals(),  # noqa: B008
    ) -> None:
        self._fabric, self._place, self._step, self._advice = fabric, place, first_step, advice
        self._name_of, self._wants_to_stop = name_of, wants_to_stop
        self._interval = 1 if fabric.device.type == "cpu" else GPU_INTERVAL
        self._pending: list[_Batch] = []
        self._sum, self._images = totals
        self.last: float | None = None  # the newest loss that was looked at
        self.stopping = False  # one of the processes was asked to end, and all of them know

    def add(self, loss: Tensor, output: Tensor, where: Tensor) -> None:
        """The mean loss of one batch, the network's output [B, K] and the positions [B] of its images."""
        finite = output.detach().isfinite().all(dim=1)
        self._pending.append(_Batch(loss.detach().float(), where, finite))
        if len(self._pending) >= self._interval:
            self._look()

    def totals(self) -> Totals:
        """Of the epoch so far, over all processes, which must all ask."""
        self._look()
        if self._fabric.world_size == 1:
            return Totals(self._sum, self._images)
        found = torch.tensor([self._sum, float(self._images)], dtype=torch.float64, device=self._fabric.device)
        found = self._fabric.all_reduce(found, reduce_op="sum")
        return Totals(float(found[0]), int(found[1]))

    def mean(self) -> float:
        """Mean loss of the epoch's images so far, over all processes."""
        total = self.totals()
        return total.loss / total.images

    def _look(self) -> None:
        if not self._pending:
            return
        losses = torch.stack([batch.loss for batch in self._pending])
        signs = torch.cat([(~losses.isfinite()).float(), losses.new_tensor([float(self._wants_to_stop())])])
        if self._fabric.world_size > 1:  # all processes must stop together: one that went on would wait for ever
            signs = self._fabric.all_reduce(signs, reduce_op="sum")
        *bad, stop = signs.tolist()
        values = losses.tolist()
        for value, flag, batch in zip(values, bad, self._pending, strict=True):
            self._step += 1
            if flag:
                raise TrainingDivergedError(self._diverged(value, batch))
            self._sum += value * len(batch.where)
            self._images += len(batch.where)
        self.last, self.stopping = values[-1], self.stopping or stop > 0
        self._pending = []

    def _diverged(self, value: float, batch: _Batch) -> str:
        where = self._place.format(step=self._step)
        text = f"the loss is {value} at {where}"
        if torch.tensor(value).isfinite():
            text = f"the loss of another process is not finite at {where}"
        wrong = batch.where[~batch.finite.cpu()]
        names = [self._name_of(int(k)) for k in (wrong if len(wrong) else batch.where)]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        what = "images without a finite output" if len(wrong) else "images of the batch"
        return f"{text}; {what}: {', '.join(names[:_NAMED])}{more}. The last good checkpoint is kept. {self._advice}"
