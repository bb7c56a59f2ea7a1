"""The training loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ernet_fast import _version
from ernet_fast.console.atomic_file import write_text
from ernet_fast.console.progress import Reporter
from ernet_fast.data import Prefetcher, Skipped, Splits, write_split_csv
from ernet_fast.train import checkpoint, device
from ernet_fast.train.config import TrainConfig, check_same_run
from ernet_fast.train.data_sets import open_run_data, report_skipped
from ernet_fast.train.describe import describe_epoch, describe_run, flatten, write_history
from ernet_fast.train.epoch import Clock, Progress
from ernet_fast.train.images import build_loader, mixed_seed
from ernet_fast.train.learner import Learner
from ernet_fast.train.loss_watch import LossWatch
from ernet_fast.train.metrics import compute_metrics, metrics_by_magnification
from ernet_fast.train.predictions import Predictions, predict
from ernet_fast.train.run_folder import (
    BEST,
    LAST,
    earlier_checkpoints,
    keep_earlier,
    newest_checkpoint,
    only_run,
    take_back,
)
from ernet_fast.train.step_log import StepLog
from ernet_fast.train.stop_signals import StopSignals, TrainingStoppedError


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
    """Train as `config` says, writing into its folder `last.pt` (after every epoch, and every `save_steps` steps),
    `best.pt`, history, split and configuration.

    A run that is interrupted (Ctrl-C, a crash, a full disk) leaves its last checkpoint, and one that gets SIGTERM or
    SIGUSR1 writes another behind the step it is in; resumed, it gives bit for bit what an uninterrupted run gives on
    the same machine (on CUDA, if torch is deterministic). If `last.pt` is damaged, the checkpoint before is taken, and
    a warning says so.

    Args:
        config: the settings.
        resume: continue the run in the folder, which must have been made with the same settings; only `data`, `out`,
            `device` and what else is in `config.FREE` may differ, and on the same images; `epochs` may be more where
            the learning rate does not depend on them (``schedule="constant"``).
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
        TrainingStoppedError: a signal asked to end, and a checkpoint was written.
    """
    if stop_after is not None and stop_after < 1:
        raise ValueError(f"stop_after={stop_after}; expected a positive number of epochs.")
    if resume and not ((config.folder / LAST).is_file() or earlier_checkpoints(config.folder)):
        raise FileNotFoundError(f"nothing to resume: no {LAST} in {config.out!r}.")
    with (
        only_run(config.folder) if device.is_first_process() else nullcontext(),
        device.deterministic_mode(config.deterministic),
        StopSignals() as signals,
    ):
        run = _Run(config, _state_to_resume(config, resume), reporter or Reporter(), signals)
        return run.train(stop_after, on_epoch or (lambda record: None))


Source = tuple[Path, dict[str, Any], list[str]]
"""The checkpoint that a run goes on from, its state, and why newer ones are not taken."""


def _state_to_resume(config: TrainConfig, resume: bool) -> Source | None:
    last = config.folder / LAST
    if resume:
        last, state, problems = newest_checkpoint(config.folder)
        with checkpoint.field_of(last, "config"):
            TrainConfig.from_dict(state["config"])
        with checkpoint.field_of(last, "split"):
            if state["split"] is not None:
                Splits.from_dict(state["split"])
        check_same_run(state["config"], config)
        return last, state, problems
    if last.exists():
        raise FileExistsError(
            f"{config.out!r} already holds a run ({LAST}). Continue it with --resume, or choose another --out."
        )
    return None


class _StopRequested(Exception):
    """Raised within validation, where the network may hold other weights than its own."""


class _Run:
    """Everything that lives while a run does."""

    def __init__(self, config: TrainConfig, source: Source | None, reporter: Reporter, signals: StopSignals) -> None:
        self.config, self.source, self.signals = config, source, signals
        self.fabric = device.build_fabric(config.device, config.precision)
        self.reporter = reporter if self.fabric.is_global_zero else Reporter(mute=True)
        torch.manual_seed(config.seed)
        state = None if source is None else source[1]
        self.data = open_run_data(config, state)
        loading: dict[str, Any] = {name: getattr(config, name) for name in ("batch_size", "seed", "num_workers")}
        loading["fabric"] = self.fabric
        balanced = config.sampling == "balanced"
        self.train_batches, self.train_order = build_loader(self.data.train, shuffle=True, balanced=balanced, **loading)
        self.val_batches, _ = build_loader(self.data.val, shuffle=False, **loading)
        self.steps_per_epoch = len(self.train_batches) // config.accumulate
        if not self.steps_per_epoch:
            raise ValueError(f"accumulate={config.accumulate}, but an epoch has {len(self.train_batches)} batch(es).")
        # The checkpoint brings all weights: those the run started from may be gone.
        own = config if state is None else replace(config, weights=None)
        self.learner = Learner(own, self.fabric, self.data, self.steps_per_epoch)
        self.epoch = 0
        self.partial = Progress()
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.lost: dict[str, str] = {}
        if source is not None:
            self._restore(*source[:2])
        if self.fabric.world_size > 1:  # dropout must differ between processes
            torch.manual_seed(mixed_seed(config.seed, self.epoch, self.fabric.global_rank))

    @property
    def step(self) -> int:
        """Optimiser steps of the run so far."""
        return self.epoch * self.steps_per_epoch + self.partial.batches // self.config.accumulate

    def _state(self) -> dict[str, Any]:
        return {
            "format": checkpoint.FORMAT,
            "version": _version.__version__,
            **self.learner.state(),
            "epoch": self.epoch,
            "step": self.step,
            "partial": self.partial.to_dict(),
            "history": self.history,
            "best": self.best,
            "rng": checkpoint.generator_state(),
            "config": self.config.to_dict(),
            **self.data.inputs,
        }

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        with checkpoint.field_of(path, "partial"):
            self.partial = Progress.from_dict(state.get("partial"))
        self.epoch, self.history, self.best = state["epoch"], state["history"], state["best"]
        if state["step"] != self.step:
            raise ValueError(
                f"the checkpoint did {state['step']} steps in {state['epoch']} epochs and {self.partial.batches} "
                f"batches, but here an epoch has {self.steps_per_epoch}: the images or the number of processes have "
                "changed."
            )
        self.learner.restore(path, state)
        with checkpoint.field_of(path, "rng"):
            checkpoint.restore_generators(state["rng"])

    def train(self, stop_after: int | None, on_epoch: Callable[[dict[str, Any]], bool | None]) -> TrainResult:
        """All epochs that are left, or `stop_after` of them."""
        config = self.config
        self._prepare_folder()
        network, on = self.learner.network, self.fabric.device
        for line in describe_run(config, self.data, network, on, self.steps_per_epoch, self.epoch):
            self.reporter.line(line)
        end = config.epochs if stop_after is None else min(config.epochs, self.epoch + stop_after)
        try:
            while self.epoch < end:
                record = self._one_epoch(self.epoch + 1)
                self.epoch, self.partial = self.epoch + 1, Progress()
                self.history.append(record)
                improved = self._is_best(record)
                if improved:
                    self.best = record
                self._save(improved)
                self.log.epoch(flatten(record), self.step)
                self.reporter.line(describe_epoch(record, config.epochs, improved))
                if on_epoch(record):
                    break
        finally:
            self.log.close()
        return TrainResult(config.folder, self.history, self.best, self.epoch >= config.epochs)

    def _prepare_folder(self) -> None:
        """Folder, configuration and split; and a first checkpoint, so that an early interruption can be resumed too."""
        self.fabric.barrier()  # all have read the checkpoint
        config, folder, first = self.config, self.config.folder, self.fabric.is_global_zero
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            if self.source is not None:
                self._go_on_from(*self.source)
            write_text(folder / "config.json", json.dumps(config.to_dict(), indent=1) + "\n")
            write_split_csv(folder / "split.csv", self.data.splits)
            if self.history:  # a kill between two files may have left it an epoch behind the checkpoint
                write_history(folder, self.history)
            report_skipped(self.data.skipped, folder, self.reporter)
            if not (folder / LAST).exists():
                checkpoint.save_checkpoint(folder / LAST, self._state())
        self.log = StepLog(
            folder, self.step, csv_file=first and config.log_steps is not None, tensorboard=first and config.tensorboard
        )
        self.fabric.barrier()

    def _go_on_from(self, path: Path, state: dict[str, Any], problems: list[str]) -> None:
        """Say which newer checkpoints are damaged, and put the one that is not in their place."""
        for problem in problems:
            self.reporter.warning(problem)
        if path.name != LAST:
            self.reporter.warning(
                f"going on from {path.name}, the checkpoint before: epoch {state['epoch']}, step {state['step']}."
            )
            take_back(path)

    def _save(self, improved: bool) -> None:
        if self.fabric.is_global_zero:
            folder, state = self.config.folder, self._state()
            try:
                if improved:  # first: a crash between the two files then repeats an epoch, and never loses the best
                    checkpoint.save_checkpoint(folder / BEST, state)
                keep_earlier(folder, self.config.keep_checkpoints)
                checkpoint.save_checkpoint(folder / LAST, state)
                if not self.partial.batches:
                    write_history(folder, self.history)
            except OSError as error:
                when = f"while epoch {self.epoch} of {self.config.epochs} was saved"
                if self.partial.batches:
                    when = f"while step {self.step} was saved"
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
        rate = self.learner.rate if self.partial.rate is None else self.partial.rate
        self._train_epoch(number, rate)
        try:
            predictions = self._validate(number)
        except _StopRequested:
            self._stop()
        done = self.partial
        return {
            "epoch": number,
            "lr": rate,
            "train_loss": done.totals.loss / done.totals.images,
            "val_loss": predictions.loss(),
            "train_seconds": round(done.seconds, 3),
            "data_wait": round(done.waited / max(done.seconds, 1e-9), 4),
            "val": compute_metrics(predictions),
            "val_by_magnification": metrics_by_magnification(predictions),
        }

    def _validate(self, number: int) -> Predictions:
        samples, classes = self.data.val.samples, self.data.classes
        with (
            self.learner.weights_to_keep(),
            self.reporter.task(f"validate {number}/{self.config.epochs}", len(samples)) as task,
        ):

            def advance(count: int) -> None:
                task.advance(count)
                if self.signals.received and self.fabric.world_size == 1:  # several would have to agree
                    raise _StopRequested

            network, forward = self.learner.network, self.learner.evaluation_pass
            return predict(network, forward, self.val_batches, samples, classes, advance=advance)

    def _stop(self) -> None:
        """Save what there is and end, as a signal to one of the processes asked for."""
        self._save(improved=False)
        name = self.signals.received or "a signal to another process"
        raise TrainingStoppedError(
            f"stopped by {name} behind step {self.step}: {self.epoch} of {self.config.epochs} epochs complete, and "
            f"{self.partial.batches} batches of the next; {LAST} is written"
        )

    def _train_epoch(self, number: int, rate: float) -> None:
        """The batches that are left of an epoch; `partial` then holds all of it."""
        config, begun = self.config, self.partial
        self.learner.model.train()
        self.train_order.epoch, self.train_order.start = number, begun.batches * config.batch_size
        watch, clock = self._watch(number, begun), Clock(begun)
        total = self.steps_per_epoch * config.accumulate
        source: Iterable[Any] = self.train_batches
        if self.fabric.device.type == "cuda":
            source = Prefetcher(self.train_batches, self.fabric.device)
        with self.reporter.task(f"train {number}/{config.epochs}", (total - begun.batches) * config.batch_size) as task:
            for done, batch in enumerate(clock.timed(islice(source, total - begun.batches)), start=begun.batches + 1):
                images, labels, where, problems = batch
                for problem in filter(None, problems):
                    self._lose(problem)
                self.learner.learn(images, labels, where, number, done, watch)
                task.advance(len(labels), "" if watch.last is None else f"loss {watch.last:.4f}")
                if done % config.accumulate:
                    continue
                self._log_step(number, done, watch, clock)
                step = (number - 1) * self.steps_per_epoch + done // config.accumulate
                due = config.save_steps is not None and step % config.save_steps == 0 and done < total
                if due or watch.stopping:
                    self.partial = clock.progress(done, watch.totals(), rate)
                    if watch.stopping:
                        self._stop()
                    self._save(improved=False)
        self.partial = clock.progress(total, watch.totals(), rate)
        self._share_lost()

    def _watch(self, number: int, begun: Progress) -> LossWatch:
        config = self.config
        advice = (
            f"Try a smaller --lr (it was {config.lr:g}), --clip-norm 1, or --precision bf16-mixed instead of 16-mixed; "
            "then --resume continues."
        )
        unit = "step" if config.accumulate == 1 else "batch"
        first = (number - 1) * self.steps_per_epoch * config.accumulate + begun.batches
        samples = self.data.train.samples
        return LossWatch(
            self.fabric, f"{unit} {{step}} (epoch {number})", first, advice, lambda k: samples[k].path.name,
            wants_to_stop=lambda: self.signals.received is not None,
            totals=begun.totals if self.fabric.is_global_zero else Progress().totals,
        )  # fmt: skip

    def _log_step(self, number: int, done: int, watch: LossWatch, clock: Clock) -> None:
        config = self.config
        step = (number - 1) * self.steps_per_epoch + done // config.accumulate
        if (config.log_steps is None and not config.tensorboard) or step % (config.log_steps or 1):
            return
        seconds, waited, batches = clock.since_last()
        loss = float("nan") if watch.last is None else watch.last
        images = batches * config.batch_size * self.fabric.world_size
        self.log.step(
            step=step, epoch=number, loss=loss, lr=self.learner.rate,
            images_per_second=round(images / max(seconds, 1e-9), 2), data_wait=round(waited / max(seconds, 1e-9), 4),
        )  # fmt: skip

    def _lose(self, problem: str) -> None:
        """An image that could be read when the run began, and now cannot; another took its place."""
        path, _, reason = problem.partition(": ")
        if path not in self.lost:
            self.lost[path] = reason
            self.reporter.warning(
                f"unreadable since the run began, another image of its class takes its place: {problem}"
            )

    def _share_lost(self) -> None:
        """List in skipped.csv what any process has lost."""
        parts: list[Any] = [self.lost] * self.fabric.world_size
        if len(parts) > 1:
            torch.distributed.all_gather_object(parts, self.lost)
        found = {path: reason for part in parts for path, reason in part.items()}
        if found and self.fabric.is_global_zero:
            lost = tuple(Skipped(Path(path), reason) for path, reason in sorted(found.items()))
            report_skipped((*self.data.skipped, *lost), self.config.folder, Reporter(mute=True))
