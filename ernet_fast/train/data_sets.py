"""The images of a run: which train, which validate, with which stains."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ernet_fast.console.atomic_file import write_text
from ernet_fast.console.progress import Reporter
from ernet_fast.data import BreakHis, Sample, Skipped, Splits
from ernet_fast.train.config import TrainConfig
from ernet_fast.train.images import ImageSet
from ernet_fast.train.selection import evenly_chosen
from ernet_fast.train.stain_choice import StainNormalization, fit_to_image, most_typical

_LISTED = 10


@dataclass(frozen=True)
class RunData:
    """Training and validation images, class names, the split, and what was left out."""

    train: ImageSet
    val: ImageSet
    classes: tuple[str, ...]
    splits: Splits
    skipped: tuple[Skipped, ...]
    stain: StainNormalization | None


def open_split(config: TrainConfig, split: str) -> BreakHis:
    """The part ``"train"``, ``"val"`` or ``"test"`` of the data that `config` describes."""
    return BreakHis(
        config.data,
        split,
        magnifications=config.magnifications,
        target=config.target,
        fold=config.fold,
        num_folds=config.num_folds,
        split_by=config.split_by,
        seed=config.seed,
        split_file=config.split_file,
        on_error=config.on_error,
    )


def open_run_data(config: TrainConfig, stain_state: dict[str, Any] | None = None) -> RunData:
    """Open both parts and choose the stain target; a resumed run brings its own `stain_state`."""
    train, val = open_split(config, "train"), open_split(config, "val")
    assert train.splits is not None
    chosen = evenly_chosen(train.samples, config.max_train_images)
    if stain_state is not None:
        stain = StainNormalization.from_state(stain_state)
    else:
        stain = _choose_stain(config, chosen)
    common: dict[str, Any] = {"resize": config.resize, "normalizer": stain, "cache": config.cache}
    return RunData(
        train=ImageSet(chosen, config.image_size, augment=config.augment, seed=config.seed, **common),
        val=ImageSet(evenly_chosen(val.samples, config.max_val_images), config.image_size, **common),
        classes=tuple(train.classes),
        splits=train.splits,
        skipped=tuple(sorted({*train.skipped, *val.skipped})),
        stain=stain,
    )


def _choose_stain(config: TrainConfig, train: list[Sample]) -> StainNormalization | None:
    if config.stain == "none":
        return None
    return most_typical(train)[1] if config.stain_target is None else fit_to_image(config.stain_target)


def report_skipped(skipped: tuple[Skipped, ...], folder: Path, reporter: Reporter) -> None:
    """Warn of images that are left out, and list all of them in `skipped.csv` of the run."""
    for path, reason in skipped[:_LISTED]:
        reporter.warning(f"left out {path}: {reason}")
    if len(skipped) > _LISTED:
        reporter.warning(f"and {len(skipped) - _LISTED} more, see {folder / 'skipped.csv'}")
    if skipped:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("path", "reason"), *skipped])
        write_text(folder / "skipped.csv", text.getvalue())


def class_weights(samples: list[Sample], num_classes: int, method: str) -> torch.Tensor | None:
    """Weights [num_classes] of the loss: ``"balanced"`` is n / (number of occurring classes * count), None for
    ``"none"``.

    A class without images gets weight 0; it never occurs in the loss.
    """
    if method == "none":
        return None
    counts = torch.bincount(torch.tensor([sample.label for sample in samples]), minlength=num_classes).float()
    weights = counts.sum() / (counts.count_nonzero() * counts)
    return torch.where(counts > 0, weights, torch.zeros_like(weights))
