"""The images of a run: which train, which validate, with which stains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ernet_fast.console.atomic_file import write_csv
from ernet_fast.console.progress import Reporter
from ernet_fast.data import BreakHis, Sample, Skipped, Splits
from ernet_fast.data.layout import find_tree, scan_tree
from ernet_fast.train.config import TrainConfig
from ernet_fast.train.images import ImageSet, evenly_chosen
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

    @property
    def inputs(self) -> dict[str, Any]:
        """The fields of a checkpoint that say on what the run was made."""
        return {
            "classes": list(self.classes),
            "split": self.splits.to_dict(),
            "train_images": [sample.name for sample in self.train.samples],
            "val_images": [sample.name for sample in self.val.samples],
            "stain": None if self.stain is None else self.stain.state(),
        }


def open_split(config: TrainConfig, split: str, splits: Splits | None = None, *, any_images: bool = False) -> BreakHis:
    """A part (``"train"``, ``"val"``, ``"test"``, ...) of the data that `config` describes.

    `splits`, of a run that exists, takes the place of a new split or that of `config.split_file`. With `any_images`,
    images that no split lists belong to the part ``"all"`` too.
    """
    names = ("magnifications", "target", "fold", "num_folds", "split_by", "seed", "on_error")
    settings = {name: getattr(config, name) for name in names}
    split_file = None if any_images or splits is not None else config.split_file
    return BreakHis(config.data, split, split_file=split_file, splits=splits, **settings)


def open_run_data(config: TrainConfig, saved: dict[str, Any] | None = None) -> RunData:
    """Open both parts and choose the stain target; a resumed run brings split and target in its checkpoint `saved`.

    Raises ValueError if the folder does not hold the images that the resumed run was made on.
    """
    splits = None if saved is None or saved["split"] is None else Splits.from_dict(saved["split"])
    if splits is not None and config.on_error == "raise":
        _check_same_images("the folder", list(splits.fold_of), scan_tree(find_tree(config.data))[0], config.data)
    train = open_split(config, config.fit_on, splits)
    assert train.splits is not None
    skipped, val_samples = set(train.skipped), []
    if config.fit_on == "train":
        val = open_split(config, "val", splits)
        skipped, val_samples = skipped | set(val.skipped), evenly_chosen(val.samples, config.max_val_images)
    chosen = evenly_chosen(train.samples, config.max_train_images)
    if saved is not None:
        _check_same_images("training", saved["train_images"], chosen, config.data)
        if saved["val_images"] is not None:
            _check_same_images("validation", saved["val_images"], val_samples, config.data)
        stain = StainNormalization.from_state(saved["stain"])
    else:
        stain = None
        if config.stain != "none":
            stain = most_typical(chosen)[1] if config.stain_target is None else fit_to_image(config.stain_target)
    common: dict[str, Any] = {"resize": config.resize, "normalizer": stain, "cache": config.cache}
    return RunData(
        train=ImageSet(chosen, config.image_size, augment=config.augment, seed=config.seed, **common),
        val=ImageSet(val_samples, config.image_size, **common),
        classes=tuple(train.classes),
        splits=train.splits,
        skipped=tuple(sorted(skipped)),
        stain=stain,
    )


def _check_same_images(part: str, saved: list[str], samples: list[Sample], data: str) -> None:
    """A run goes on with the images that it began with."""
    now = {sample.name for sample in samples}
    gone, new = sorted(set(saved) - now), sorted(now - set(saved))
    if gone or new:
        changes = [f"{len(names)} {what} (e.g. {names[0]})" for names, what in ((gone, "gone"), (new, "new")) if names]
        raise ValueError(
            f"the images in {data!r} have changed since the run began; of {part}, {' and '.join(changes)}. Resume with "
            "--data naming a folder with the same images, or start a new run."
        )


def report_skipped(skipped: tuple[Skipped, ...], folder: Path, reporter: Reporter) -> None:
    """Warn of images that are left out, and list all of them in `skipped.csv` of the run."""
    for path, reason in skipped[:_LISTED]:
        reporter.warning(f"left out {path}: {reason}")
    if len(skipped) > _LISTED:
        reporter.warning(f"and {len(skipped) - _LISTED} more, see {folder / 'skipped.csv'}")
    if skipped:
        write_csv(folder / "skipped.csv", [("path", "reason"), *skipped])


def class_weights(samples: list[Sample], num_classes: int, method: str) -> torch.Tensor | None:
    """Weights [num_classes] of the loss: ``"balanced"`` is n / (number of occurring classes * count), 0 for a class
    without images; None for ``"none"``.
    """
    if method == "none":
        return None
    counts = torch.bincount(torch.tensor([sample.label for sample in samples]), minlength=num_classes).float()
    return torch.where(counts > 0, counts.sum() / (counts.count_nonzero() * counts), 0.0)
