"""The training loop."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ernet_fast import _version
from ernet_fast.console.atomic_file import write_text
from ernet_fast.console.progress import Reporter
from ernet_fast.data import Splits, write_split_csv
from ernet_fast.train import checkpoint, device
from ernet_fast.train.config import TrainConfig, check_same_run
from ernet_fast.train.data_sets import class_weights, open_run_data, report_skipped
from ernet_fast.train.describe import describe_epoch, describe_run, write_history
from ernet_fast.train.images import build_loader, mixed_seed
from ernet_fast.train.loss_watch import LossWatch
from ernet_fast.train.metrics import compute_metrics, metrics_by_magnification
from ernet_fast.train.network import build_network, build_optimizer, build_schedule, check_moments, uses_channels_last
from ernet_fast.train.predictions import predict
from ernet_fast.train.run_folder import BEST, LAST, only_run


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind: its folder, one record an epoch, the best record, and whether all epochs are done."""

    folder: Path
    history: list[dict[str, Any]]
    best: dict[str, Any]
    finished: bool

    @property
    def best_checkpoint(self) -> Path:
        """The checkpoint with the best validation figure."""
        return self.folder / BEST


def fit(
    config: TrainConfig,
    *,
    resume: bool = False,
    stop_after: int | None = None,
    reporter: Reporter | None = None,
    on_epoch: Callable[[dict[str, Any]], bool | None] | None = None,
) -> TrainResult:
    """Train as `config` says, writing into its folder `last.pt` (after every epoch), `best.pt`, history, split and
    configuration.

    A run that is interrupted (Ctrl-C, a crash, a full disk) leaves the checkpoint of its last complete epoch; resumed,
    it gives bit for bit what an uninterrupted run gives on the same machine (on CUDA, if torch is deterministic).

    Args:
        config: the settings.
        resume: continue the run in the folder, which must have been made with the same settings; only `data`, `out`,
            `device`, `num_workers` and `cache` may differ, and on the same images.
        stop_after: end after this many epochs of the present call, to be resumed later.
        reporter: where progress goes; default: stderr.
        on_epoch: called with each epoch's record after its checkpoint is written; if it returns True, the call ends as
            with `stop_after`. With several processes it must decide the same in all.

    Raises:
        FileExistsError: the folder holds a run and `resume` is false.
        FileNotFoundError: nothing to resume, or no data.
        ValueError: settings and checkpoint or data do not fit, or the checkpoint is damaged.
        RuntimeError: another run is writing to the folder.
        OSError: a file cannot be written, e.g. the disk is full; the last good checkpoint is kept.
        TrainingDivergedError: the loss is not finite; the last good checkpoint is kept.
    """
    if stop_after is not None and stop_after < 1:
        raise ValueError(f"stop_after={stop_after}; expected a positive number of epochs.")
    if resume and not (config.folder / LAST).is_file():
        raise FileNotFoundError(f"nothing to resume: no {LAST} in {config.out!r}.")
    with (
        only_run(config.folder) if device.is_first_process() else nullcontext(),
        device.deterministic_mode(config.deterministic),
    ):
        run = _Run(config, _state_to_resume(config, resume), reporter or Reporter())
        return run.train(stop_after, on_epoch or (lambda record: None))


def _state_to_resume(config: TrainConfig, resume: bool) -> dict[str, Any] | None:
    last = config.folder / LAST
    if resume:
        state = checkpoint.load_checkpoint(last)
        with checkpoint.field_of(last, "config"):
            TrainConfig.from_dict(state["config"])
        with checkpoint.field_of(last, "split"):
            if state["split"] is not None:
                Splits.from_dict(state["split"])
        check_same_run(state["config"], config)
        return state
    if last.exists():
        raise FileExistsError(
            f"{config.out!r} already holds a run ({LAST}). Continue it with --resume, or choose another --out."
        )
    return None


class _Run:
    """Everything that lives while a run does."""

    def __init__(self, config: TrainConfig, state: dict[str, Any] | None, reporter: Reporter) -> None:
        self.config = config
        self.fabric = device.build_fabric(config.device, config.precision)
        self.reporter = reporter if self.fabric.is_global_zero else Reporter(mute=True)
        torch.manual_seed(config.seed)
        self.data = open_run_data(config, state)
        loading: dict[str, Any] = {name: getattr(config, name) for name in ("batch_size", "seed", "num_workers")}
        loading["fabric"] = self.fabric
        self.train_batches, self.train_order = build_loader(self.data.train, shuffle=True, **loading)
        self.val_batches, _ = build_loader(self.data.val, shuffle=False, **loading)
        self.steps_per_epoch = len(self.train_batches)
        # The checkpoint brings all weights: those the run started from may be gone.
        self._build_network(config if state is None else replace(config, weights=None))
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        if state is not None:
            self._restore(state)
        if self.fabric.world_size > 1:  # dropout must differ between processes
            torch.manual_seed(mixed_seed(config.seed, self.epoch, self.fabric.global_rank))

    def _build_network(self, config: TrainConfig) -> None:
        self.network = build_network(config, len(self.data.classes))
        channels_last = uses_channels_last(config, self.fabric.device)
        if channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = build_optimizer(self.network, config)
        self.schedule = build_schedule(optimizer, config, self.steps_per_epoch)
        self.model, self.optimizer = self.fabric.setup(self.network, optimizer)
        weights = class_weights(self.data.train.samples, len(self.data.classes), config.class_weights)
        loss = nn.CrossEntropyLoss(weight=weights, label_smoothing=config.label_smoothing)
        self.loss = loss.to(self.fabric.device)
        self.to_network = device.to_network(self.fabric, channels_last)
        self.evaluation_pass = device.evaluation_pass(self.fabric, self.network, channels_last)

    def _state(self) -> dict[str, Any]:
        return {
            "format": checkpoint.FORMAT,
            "version": _version.__version__,
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "epoch": self.epoch,
            "step": self.epoch * self.steps_per_epoch,
            "history": self.history,
            "best": self.best,
            "rng": checkpoint.generator_state(),
            "config": self.config.to_dict(),
            **self.data.inputs,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        if state["step"] != state["epoch"] * self.steps_per_epoch:
            raise ValueError(
                f"the checkpoint did {state['step']} steps in {state['epoch']} epochs, but here an epoch has "
                f"{self.steps_per_epoch}: the images or the number of processes have changed."
            )
        path = self.config.folder / LAST
        checkpoint.load_network(self.network, state, path)
        with checkpoint.field_of(path, "optimizer"):
            self.optimizer.load_state_dict(state["optimizer"])
            check_moments(self.optimizer)
        with checkpoint.field_of(path, "schedule"):
            self.schedule.load_state_dict(state["schedule"])
        with checkpoint.field_of(path, "precision"):
            if state["precision"]:
                self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.epoch, self.history, self.best = state["epoch"], state["history"], state["best"]
        with checkpoint.field_of(path, "rng"):
            checkpoint.restore_generators(state["rng"])

    def train(self, stop_after: int | None, on_epoch: Callable[[dict[str, Any]], bool | None]) -> TrainResult:
        """All epochs that are left, or `stop_after` of them."""
        config = self.config
        self._prepare_folder()
        for line in describe_run(config, self.data, self.network, self.fabric.device, self.steps_per_epoch, self.epoch):
            self.reporter.line(line)
        end = config.epochs if stop_after is None else min(config.epochs, self.epoch + stop_after)
        while self.epoch < end:
            record = self._one_epoch(self.epoch + 1)
            self.epoch += 1
            self.history.append(record)
            improved = self._is_best(record)
            if improved:
                self.best = record
            self._save(improved)
            self.reporter.line(describe_epoch(record, config.epochs, improved))
            if on_epoch(record):
                break
        return TrainResult(config.folder, self.history, self.best, self.epoch >= config.epochs)

    def _prepare_folder(self) -> None:
        """Folder, configuration and split; and a first checkpoint, so that an early interruption can be resumed too."""
        if self.fabric.is_global_zero:
            folder = self.config.folder
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "config.json", json.dumps(self.config.to_dict(), indent=1) + "\n")
            write_split_csv(folder / "split.csv", self.data.splits)
            if self.history:  # a kill between two files may have left it an epoch behind the checkpoint
                write_history(folder, self.history)
            report_skipped(self.data.skipped, folder, self.reporter)
            if not (folder / LAST).exists():
                checkpoint.save_checkpoint(folder / LAST, self._state())
        self.fabric.barrier()

    def _save(self, improved: bool) -> None:
        if self.fabric.is_global_zero:
            folder, state = self.config.folder, self._state()
            try:
                if improved:  # first: a crash between the two files then repeats an epoch, and never loses the best
                    checkpoint.save_checkpoint(folder / BEST, state)
                checkpoint.save_checkpoint(folder / LAST, state)
                write_history(folder, self.history)
            except OSError as error:
                when = f"while epoch {self.epoch} of {self.config.epochs} was saved"
                error.strerror = f"{error.strerror or error}, {when}"
                error.filename = error.filename or str(folder)
                raise
        self.fabric.barrier()

    def _is_best(self, record: dict[str, Any]) -> bool:
        """An undefined AUC is the worst, the loss decides between equal ones; without validation, the last epoch."""

        def rank(record: dict[str, Any]) -> tuple[float, float]:
            auc = record["val"]["auc"]
            return (-1.0 if auc is None or self.config.select_by == "loss" else auc, -record["val_loss"])

        return not self.best or record["val_loss"] is None or rank(record) > rank(self.best)

    def _one_epoch(self, number: int) -> dict[str, Any]:
        start = time.perf_counter()
        rate = self.optimizer.param_groups[0]["lr"]
        train_loss = self._train_epoch(number)
        seconds = time.perf_counter() - start
        device.share_buffers(self.network)
        with self.reporter.task(f"validate {number}/{self.config.epochs}", len(self.data.val)) as task:
            samples, classes = self.data.val.samples, self.data.classes
            predictions = predict(
                self.network, self.evaluation_pass, self.val_batches, samples, classes, advance=task.advance
            )
        return {
            "epoch": number,
            "lr": rate,
            "train_loss": train_loss,
            "val_loss": predictions.loss(),
            "train_seconds": round(seconds, 3),
            "val": compute_metrics(predictions),
            "val_by_magnification": metrics_by_magnification(predictions),
        }

    def _train_epoch(self, number: int) -> float:
        config = self.config
        self.model.train()
        self.train_order.epoch = number
        advice = (
            f"Try a smaller --lr (it was {config.lr:g}), --clip-norm 1, or --precision bf16-mixed instead of 16-mixed; "
            "then --resume continues."
        )
        watch = LossWatch(self.fabric, number, (number - 1) * self.steps_per_epoch, advice)
        count = self.steps_per_epoch * config.batch_size
        with self.reporter.task(f"train {number}/{config.epochs}", count) as task:
            for images, labels, _ in self.train_batches:
                output = self.model(self.to_network(images))
                loss = self.loss(output.float(), labels.to(self.fabric.device, non_blocking=True))
                watch.add(loss, len(labels))
                self.optimizer.zero_grad(set_to_none=True)
                self.fabric.backward(loss)
                if config.clip_norm is not None:
                    self.fabric.clip_gradients(self.model, self.optimizer, max_norm=config.clip_norm)
                self.optimizer.step()
                self.schedule.step()
                task.advance(len(labels), "" if watch.last is None else f"loss {watch.last:.4f}")
        return watch.mean()
