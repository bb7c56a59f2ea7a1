"""What a training run is: every setting, its meaning and its range."""

from __future__ import annotations

import math
import os
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ernet_fast.data import MAGNIFICATIONS

MODELS = ("er_resnet18", "er_resnet34", "er_resnet50", "er_resnet101", "er_resnet152")
PRECISIONS = ("32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed")
SCHEDULES = ("cosine", "one-cycle", "constant")
FREE = ("data", "out", "device", "num_workers", "cache")
"""Settings that may change when a run is resumed: where things lie, and what does the work."""


def _setting(default: Any, meaning: str, *choices: str, number: tuple[type, float, float] | None = None) -> Any:
    """One field: default, meaning, and either its allowed values or (int or float, smallest, largest)."""
    metadata = {"meaning": meaning, "choices": choices or None, "number": number}
    return field(default=default, metadata=metadata)


_INF = math.inf


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training run. Each field's meaning is in its metadata, in `ernet-fast train --help` and in
    docs/training.md.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range, or two settings contradict each other.
    """

    data: str = _setting(MISSING, "folder with images in the BreakHis layout")
    out: str = _setting(MISSING, "folder of the run: checkpoints, history, split, configuration")

    target: str = _setting(
        "binary", "classes to distinguish: benign and malignant, or the eight tumour types", "binary", "subtype"
    )
    magnifications: tuple[int, ...] | None = _setting(None, "magnifications to use (40, 100, 200, 400); default all")
    split_by: str = _setting("patient", "keep a patient's images together, or split image by image", "patient", "image")
    fit_on: str = _setting(
        "train",
        "images to train on: all folds but one, which validates, or (a final fit) all folds, without validation",
        "train",
        "trainval",
    )
    fold: int = _setting(0, "cross-validation fold that validates", number=(int, 0, 99))
    num_folds: int = _setting(5, "number of cross-validation folds", number=(int, 2, 100))
    split_file: str | None = _setting(
        None, "CSV with the split (ernet_fast.data.write_split_csv), instead of a new one"
    )
    on_error: str = _setting("raise", "unusable image: stop, or leave it out and list it", "raise", "skip")
    max_train_images: int | None = _setting(
        None,
        "train on at most this many images, evenly chosen over classes, patients and magnifications",
        number=(int, 1, _INF),
    )
    max_val_images: int | None = _setting(
        None, "validate on at most this many images, chosen in the same way", number=(int, 1, _INF)
    )

    stain: str = _setting("macenko", "stain normalisation of every image", "macenko", "none")
    stain_target: str | None = _setting(
        None, "image whose stains all others get; default: the training image with the most typical stains"
    )
    image_size: int = _setting(224, "height and width of the network's input, pixels", number=(int, 16, 4096))
    resize: str = _setting("shorter", "scale the shorter side and crop, or squeeze both sides", "shorter", "squeeze")
    augment: bool = _setting(True, "flip, turn, rotate, shift and zoom training images at random")
    cache: bool = _setting(False, "keep the decoded, normalised and resized images in memory after their first use")
    num_workers: int = _setting(0, "processes that read images; 0 reads in the main process", number=(int, 0, 256))

    model: str = _setting("er_resnet18", "network", *MODELS)
    block: str = _setting("standard", "residual block: the usual one, or 1x1, 3x3, 3x3", "standard", "er133")
    base_channels: int = _setting(
        64, "channels of the stem, which all widths follow; 64 is usual", number=(int, 1, 1024)
    )
    norm: str = _setting("batch", "normaliser of the ER shortcuts", "batch", "group")
    num_groups: int | None = _setting(None, "groups of norm=group", number=(int, 1, 2048))
    fused: bool = _setting(True, "fused ER shortcuts; otherwise the naive composition of the same network")
    memory: str = _setting(
        "usual", "what backward keeps; lean: fewer maps, some computed again, the same gradients", "usual", "lean"
    )
    weights: str | None = _setting(
        None, "file with a state dict of a (torchvision) ResNet or of this network to start from"
    )

    epochs: int = _setting(30, "passes over the training images", number=(int, 1, 100_000))
    batch_size: int = _setting(32, "images a step and process", number=(int, 1, 65_536))
    optimizer: str = _setting("adamw", "optimiser", "adamw", "sgd")
    lr: float = _setting(1e-3, "highest learning rate", number=(float, 0.0, 100.0))
    weight_decay: float = _setting(
        0.05,
        "weight decay of convolution and linear weights (not of biases and normalisation weights)",
        number=(float, 0.0, 10.0),
    )
    momentum: float = _setting(0.9, "momentum of sgd (with Nesterov's step)", number=(float, 0.0, 0.9999))
    schedule: str = _setting(
        "cosine", "learning rate over the run: warm-up and cosine, one cycle, or constant", *SCHEDULES
    )
    warmup_epochs: float = _setting(1.0, "linear warm-up of schedule=cosine, epochs", number=(float, 0.0, _INF))
    class_weights: str = _setting(
        "none", "weights of the classes in the loss: equal, or inverse to their frequency", "none", "balanced"
    )
    label_smoothing: float = _setting(0.0, "share of each label spread over all classes", number=(float, 0.0, 0.9999))
    clip_norm: float | None = _setting(None, "clip the gradient to this norm", number=(float, 1e-9, _INF))
    select_by: str = _setting("auc", "validation figure that the best checkpoint is chosen by", "auc", "loss")

    device: str = _setting("auto", "device: auto takes CUDA if there is one", "auto", "cpu", "cuda")
    precision: str = _setting("32-true", "numeric precision, in Lightning Fabric's names", *PRECISIONS)
    channels_last: bool = _setting(
        True,
        "store activations channels-last, the fastest layout of the fused operators (not on CPUs below 16 "
        "base_channels, where torch 2.13 corrupts memory)",
    )
    deterministic: bool = _setting(False, "ask torch for deterministic algorithms where it has them, slower on CUDA")
    seed: int = _setting(0, "seed of weights, split, order and augmentation", number=(int, 0, 2**32 - 1))

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_value(item.name, getattr(self, item.name), str(item.type), item.metadata)
        if self.magnifications is not None:
            wrong = [m for m in self.magnifications if m not in MAGNIFICATIONS]
            if wrong or not self.magnifications:
                raise ValueError(f"magnifications={self.magnifications!r}; expected one or more of {MAGNIFICATIONS}.")
        if self.fold >= self.num_folds and self.split_file is None:
            raise ValueError(f"fold={self.fold} with num_folds={self.num_folds}; expected 0 <= fold < num_folds.")
        if self.fit_on == "trainval" and self.max_val_images is not None:
            raise ValueError(f"max_val_images={self.max_val_images} with fit_on='trainval', which validates on none.")
        if self.stain == "none" and self.stain_target is not None:
            raise ValueError(f"stain_target={self.stain_target!r} with stain='none'; drop one of the two.")
        if self.norm == "batch" and self.num_groups is not None:
            raise ValueError(f"num_groups={self.num_groups} with norm='batch'; it belongs to norm='group'.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values (tuples become lists), for JSON and checkpoints."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`. Raises ValueError for a name that is no setting."""
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown setting(s) {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
        if values.get("magnifications") is not None:
            values = {**values, "magnifications": tuple(values["magnifications"])}
        return cls(**values)

    @property
    def folder(self) -> Path:
        """`out` as a path."""
        return Path(self.out)


def check_same_run(saved: dict[str, Any], config: TrainConfig) -> None:
    """Raise ValueError if `config` would not continue the run that was saved, naming each difference."""
    now = config.to_dict()
    # settings that came after the version that saved the run had their default then
    saved = {item.name: item.default for item in fields(TrainConfig) if item.default is not MISSING} | saved
    changed = [name for name in now if name not in FREE and saved.get(name) != now[name]]
    if changed:
        listed = ", ".join(f"{name} was {saved.get(name)!r}, now {now[name]!r}" for name in changed)
        raise ValueError(
            f"the run in {config.out!r} was made with other settings: {listed}. Resume without them, or start a new "
            "--out."
        )


def _check_value(name: str, value: Any, annotation: str, metadata: Any) -> None:
    """Type, range and choice of one setting, from its annotation and metadata."""
    choices, number = metadata["choices"], metadata["number"]
    if value is None:
        if "None" not in annotation:
            raise TypeError(f"{name} is None; expected {annotation}.")
    elif choices is not None:
        if value not in choices:
            raise ValueError(f"{name}={value!r}; expected one of {', '.join(map(repr, choices))}.")
    elif number is not None:
        kind, low, high = number
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise TypeError(f"{name}={value!r}; expected {'an integer' if kind is int else 'a number'}.")
        if not low <= value <= high:
            bounds = f"at least {low:g}" if high == _INF else f"between {low:g} and {high:g}"
            raise ValueError(f"{name}={value!r}; expected a value {bounds}.")
    elif annotation == "bool":
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r}; expected True or False.")
    elif name == "magnifications":
        if not isinstance(value, tuple):
            raise TypeError(f"{name}={value!r}; expected a tuple of magnifications.")
    elif not isinstance(value, (str, os.PathLike)) or not str(value):
        raise TypeError(f"{name}={value!r}; expected a path.")
