"""The images of a run: which train, which validate, with which stains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ernet_fast.console.atomic_file import write_csv
from ernet_fast.console.progress import Reporter
from ernet_fast.data import BreakHis, ListedImages, Sample, Skipped, Splits
from ernet_fast.data.listed import layout_of
from ernet_fast.data.packed import PackedImages
from ernet_fast.train.config import TrainConfig
from ernet_fast.train.images import ImageSet, evenly_chosen
from ernet_fast.train.stain_choice import StainNormalization, most_typical, normalise_to, read_state

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
            "train_patients": sorted({sample.patient for sample in self.train.samples}),
            "val_images": [sample.name for sample in self.val.samples],
            "stain": None if self.stain is None else self.stain.state(),
        }


def open_split(
    config: TrainConfig,
    split: str,
    splits: Splits | None = None,
    *,
    any_images: bool = False,
    verify: bool | None = None,
) -> BreakHis:
    """A part (``"train"``, ``"val"``, ``"test"``, ...) of the data that `config` describes.

    `splits`, of a run that exists, takes the place of a new split or that of `config.split_file`. With `any_images`,
    images that no split lists belong to the part ``"all"`` too. `verify`: see `BreakHis`.
    """
    names = ("magnifications", "target", "fold", "num_folds", "split_by", "seed", "on_error")
    settings = {name: getattr(config, name) for name in names}
    split_file = None if any_images or splits is not None else config.split_file
    kind = BreakHis if layout_of(config.data, config.layout) == "breakhis" else ListedImages
    return kind(config.data, split, split_file=split_file, splits=splits, verify=verify, **settings)


def open_run_data(config: TrainConfig, saved: dict[str, Any] | None = None) -> RunData:
    """Open both parts and choose the stain target; a resumed run brings split and target in its checkpoint `saved`.

    Raises ValueError if the folder does not hold the images that the resumed run was made on.
    """
    splits = None if saved is None or saved["split"] is None else Splits.from_dict(saved["split"])
    if splits is not None and config.on_error == "raise":
        lenient = replace(config, magnifications=None, on_error="skip")
        everything = open_split(lenient, "all", any_images=True, verify=False).samples
        _check_same_images("the folder", list(splits.fold_of), everything, config.data)
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
        stain = _stain_of(config, chosen)
    packed = None if config.packed is None else PackedImages(config.packed)
    if packed is not None:
        stain = _check_packed(config, packed, [*chosen, *val_samples], stain, resumed=saved is not None)
    common: dict[str, Any] = {
        "resize": config.resize, "normalizer": stain, "cache": config.cache, "packed": packed,
    }  # fmt: skip
    training: dict[str, Any] = {"training": True, "random_crop": config.augment, "seed": config.seed}
    return RunData(
        train=ImageSet(chosen, config.image_size, on_error=config.on_error, **training, **common),
        val=ImageSet(val_samples, config.image_size, **common),
        classes=tuple(train.classes),
        splits=train.splits,
        skipped=tuple(sorted(skipped)),
        stain=stain,
    )


def _stain_of(config: TrainConfig, chosen: list[Sample]) -> StainNormalization | None:
    """The normalisation of a new run: None, or to the target that is named, that of the pack, or the most typical."""
    if config.stain == "none" or (config.packed is not None and PackedImages(config.packed).settings["stain"]):
        return None
    target = most_typical(chosen)[0] if config.stain_target is None else config.stain_target
    stain = normalise_to(config.stain, target)
    return stain.by_slide() if config.stain_fit == "slide" else stain


def _check_packed(
    config: TrainConfig, packed: PackedImages, samples: list[Sample], stain: StainNormalization | None, *, resumed: bool
) -> StainNormalization | None:
    """The run's normalisation, if packed images give the pixels that the files would; else ValueError."""
    settings, missing = packed.settings, [sample.name for sample in samples if sample.name not in packed]
    where = f"packed={config.packed!r}"
    if missing:
        raise ValueError(f"{where} lacks {len(missing)} of the images, e.g. {missing[0]}; pack the data anew.")
    if settings["image_size"] is not None:
        own = (config.image_size, config.resize)
        if (settings["image_size"], settings["resize"]) != own:
            found = f"{settings['image_size']} pixels, {settings['resize']!r}"
            raise ValueError(f"{where} was resized to {found}; the run wants {own[0]} pixels, {own[1]!r}. Pack anew.")
        if settings["stain"] is None and config.stain != "none":
            raise ValueError(
                f"{where} was resized and not normalised, and images are normalised before they are resized. Pack with "
                "--stain-target, or without --image-size, or train with stain='none'."
            )
    if settings["stain"] is None:
        return stain
    held = StainNormalization.from_state(read_state(settings["stain"]))
    assert held is not None
    if config.stain == "none":
        raise ValueError(f"{where} holds images normalised to {held.source}; the run has stain='none'. Pack anew.")
    if config.stain != held.method:
        raise ValueError(f"{where} was normalised by {held.method}; the run has stain={config.stain!r}. Pack anew.")
    if ("slides" in settings["stain"]) != (config.stain_fit == "slide"):
        raise ValueError(f"{where} was packed with another stain_fit than {config.stain_fit!r}. Pack anew.")
    wanted = stain if resumed or config.stain_target is None else normalise_to(config.stain, config.stain_target)
    if wanted is not None and not held.same_target(wanted):
        raise ValueError(f"{where} is normalised to {held.source}, the run to {wanted.source}. Pack anew.")
    return held


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
