"""The network of a run and what changes it: loss, optimiser, schedule, average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ernet_fast.models.sync_norm import synchronise_norms
from ernet_fast.train import checkpoint, device
from ernet_fast.train.config import TrainConfig
from ernet_fast.train.data_sets import RunData, class_weights
from ernet_fast.train.loss_watch import LossWatch
from ernet_fast.train.moving_average import MovingAverage
from ernet_fast.train.network import build_network, build_optimizer, build_schedule, check_moments, uses_channels_last
from ernet_fast.train.training_input import TrainingInput


class Learner:
    """Network, optimiser and schedule of a run on its device, and a step of theirs.

    Attributes:
        network: the bare network; `model` is what Fabric made of it.
        evaluation_pass: from images to the network's output, for `predict`.
    """

    def __init__(self, config: TrainConfig, fabric: Any, data: RunData, steps_per_epoch: int) -> None:
        self.config, self.fabric, self.steps_per_epoch = config, fabric, steps_per_epoch
        self.network = build_network(config, len(data.classes))
        if config.sync_batchnorm and fabric.world_size > 1:
            self.network = synchronise_norms(self.network, fabric.device, timm=config.is_timm)
        channels_last = uses_channels_last(config, fabric.device)
        if channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = build_optimizer(self.network, config)
        self.schedule = build_schedule(optimizer, config, steps_per_epoch)
        self.model, self.optimizer = fabric.setup(self.network, optimizer)
        self.average = None if config.ema is None else MovingAverage(self.network, config.ema)
        weights = class_weights(data.train.samples, len(data.classes), config.class_weights)
        self.loss = nn.CrossEntropyLoss(weight=weights, label_smoothing=config.label_smoothing).to(fabric.device)
        self.training_input = TrainingInput(config)
        self.to_network = device.to_network(fabric, channels_last)
        self.evaluation_pass = device.evaluation_pass(fabric, self.network, channels_last)

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def learn(self, images: Tensor, labels: Tensor, where: Tensor, epoch: int, done: int, watch: LossWatch) -> None:
        """Gradients of the batch that is number `done` of an epoch, and a step with the last of `accumulate`.

        Images uint8 [B, 3, S, S], class indices [B] and positions [B] as `ImageSet` gives them in training.
        """
        config, fabric = self.config, self.fabric
        first, last = (done - 1) % config.accumulate == 0, done % config.accumulate == 0
        pixels = self.training_input(images.to(fabric.device, non_blocking=True), epoch, where.cpu())
        apart = not last and fabric.world_size > 1
        with fabric.no_backward_sync(self.model) if apart else nullcontext():
            output: Tensor = self.model(self.to_network(pixels))
            loss = self.loss(output.float(), labels.to(fabric.device, non_blocking=True))
            watch.add(loss, output, where)
            if first:
                self.optimizer.zero_grad(set_to_none=True)
            fabric.backward(loss / config.accumulate)
        if last:
            if config.clip_norm is not None:
                fabric.clip_gradients(self.model, self.optimizer, max_norm=config.clip_norm)
            self.optimizer.step()
            self.schedule.step()
            if self.average is not None:
                self.average.update((epoch - 1) * self.steps_per_epoch + done // config.accumulate)

    @contextmanager
    def weights_to_keep(self) -> Iterator[None]:
        """The network has, within the block, the weights that are validated and kept, and all processes the same."""
        device.share_buffers(self.network)
        if self.average is None:
            yield
            return
        for tensor in self.average.state.values() if self.fabric.world_size > 1 else ():
            torch.distributed.broadcast(tensor, src=0)
        with self.average.applied():
            yield

    def state(self) -> dict[str, Any]:
        """Fields of a checkpoint; `model` are the weights to keep, `training_model` those that an average is of."""
        own = self.network.state_dict()
        return {
            "model": own if self.average is None else self.average.state,
            "training_model": None if self.average is None else own,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
        }

    def restore(self, path: Path, state: dict[str, Any]) -> None:
        """Take over these fields of the checkpoint at `path`; ValueError names one that does not fit."""
        own = state.get("training_model")
        checkpoint.load_network(self.network, state if own is None else state | {"model": own}, path)
        if self.average is not None:
            self.average.load(state["model"])
        with checkpoint.field_of(path, "optimizer"):
            self.optimizer.load_state_dict(state["optimizer"])
            check_moments(self.optimizer)
        with checkpoint.field_of(path, "schedule"):
            self.schedule.load_state_dict(state["schedule"])
        with checkpoint.field_of(path, "precision"):
            if state["precision"]:
                self.fabric.strategy.precision.load_state_dict(state["precision"])
