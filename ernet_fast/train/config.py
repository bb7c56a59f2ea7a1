"""What a training run is: every setting, its meaning and its range."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ernet_fast.data import MAGNIFICATIONS
from ernet_fast.train.protocols import PROTOCOLS

_DEPTHS = (18, 34, 50, 101, 152)
ER_MODELS = tuple(f"er_resnet{depth}" for depth in _DEPTHS)
PLAIN_MODELS = tuple(f"resnet{depth}" for depth in _DEPTHS)
TIMM = "timm/"
"""Optional prefix of a timm model's name; the only way to timm's own `resnet50`."""
PRECISIONS = ("32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed")
SCHEDULES = ("cosine", "one-cycle", "constant")
FREE = (
    "data", "out", "device", "num_workers", "cache", "packed", "save_steps", "keep_checkpoints", "log_steps",
    "tensorboard",
)  # fmt: skip
"""Settings that may change when a run is resumed: where things lie, what does the work, and what is written when."""


def _setting(
    default: Any, meaning: str, *choices: str, number: tuple[type, float, float] | None = None, pair: bool = False
) -> Any:
    """One field: default, meaning, and either its allowed values or (int or float, smallest, largest); `pair`: two."""
    metadata = {"meaning": meaning, "choices": choices or None, "number": number, "pair": pair}
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

    data: str = _setting(MISSING, "images: BreakHis, a folder with one folder a class, or a CSV list")
    out: str = _setting(MISSING, "folder of the run: checkpoints, history, split, configuration")
    protocol: str | None = _setting(
        None, "named set of settings that this run began from; others override them one by one", *PROTOCOLS
    )

    layout: str = _setting(
        "auto",
        "what `data` is; auto looks: a CSV file, breast/benign and breast/malignant, or one folder a class",
        "auto",
        "breakhis",
        "folders",
        "csv",
    )
    target: str = _setting(
        "binary",
        "classes of BreakHis to distinguish: benign and malignant, or the eight tumour types",
        "binary",
        "subtype",
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
        None,
        "CSV with the split (ernet_fast.data.write_split_csv), or a published fold of BreakHis (dsfold1.txt), instead "
        "of a new one",
    )
    on_error: str = _setting(
        "raise",
        "unusable image: stop, or leave it out and list it (if it becomes unreadable in training, another of its class "
        "takes its place)",
        "raise",
        "skip",
    )
    sampling: str = _setting(
        "shuffled", "images of an epoch: each once, or equally many of each class", "shuffled", "balanced"
    )
    max_train_images: int | None = _setting(
        None,
        "train on at most this many images, evenly chosen over classes, patients and magnifications",
        number=(int, 1, _INF),
    )
    max_val_images: int | None = _setting(
        None, "validate on at most this many images, chosen in the same way", number=(int, 1, _INF)
    )

    stain: str = _setting("macenko", "stain normalisation of every image", "macenko", "reinhard", "none")
    stain_target: str | None = _setting(
        None, "image whose stains all others get; default: the training image with the most typical stains"
    )
    stain_fit: str = _setting(
        "image", "stains of an image: its own, or those of all images of its slide together", "image", "slide"
    )
    image_size: int = _setting(224, "height and width of the network's input, pixels", number=(int, 16, 4096))
    resize: str = _setting("shorter", "scale the shorter side and crop, or squeeze both sides", "shorter", "squeeze")
    augment: bool = _setting(True, "change training images at random, as the next settings say")
    flips: bool = _setting(True, "flip left-right and up-down, each half of the time")
    quarter_turns: bool = _setting(True, "turn by a random multiple of 90 degrees")
    rotation: float = _setting(15.0, "rotate by up to this many degrees either way", number=(float, 0.0, 180.0))
    translation: float = _setting(
        0.05, "shift along each side by up to this share of it either way", number=(float, 0.0, 0.9999)
    )
    zoom: tuple[float, float] = _setting(
        (0.9, 1.1), "scale by a factor between these two (log-uniform)", number=(float, 0.01, 100.0), pair=True
    )
    crop: float = _setting(
        1.0,
        "cut out a square with this share of the side at least, anywhere, and enlarge it to the image size; 1 cuts "
        "nothing off",
        number=(float, 0.01, 1.0),
    )
    stain_gain: float = _setting(
        0.0, "stain augmentation: multiply each stain's concentration by 1 +- this at most", number=(float, 0.0, 0.9999)
    )
    stain_shift: float = _setting(
        0.0, "stain augmentation: add up to this to each stain's concentration, either way", number=(float, 0.0, 4.0)
    )
    cache: bool = _setting(False, "keep the decoded, normalised and resized images in memory after their first use")
    packed: str | None = _setting(
        None, "folder that `ernet-fast pack` made of the data, to read images from instead of their files"
    )
    num_workers: int = _setting(0, "processes that read images; 0 reads in the main process", number=(int, 0, 256))

    model: str = _setting(
        "er_resnet18",
        "network: er_resnet18, 34, 50, 101 or 152; the plain ResNet resnet18, 34, 50, 101 or 152; or a model of timm, "
        "if that is installed (timm/NAME for names that are also ours)",
    )
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
    accumulate: int = _setting(
        1, "batches whose gradients make one step, so that batch_size * accumulate images do", number=(int, 1, 65_536)
    )
    optimizer: str = _setting("adamw", "optimiser", "adamw", "adam", "sgd")
    betas: tuple[float, float] = _setting(
        (0.9, 0.999), "decay of adam's and adamw's two moments", number=(float, 0.0, 0.999999), pair=True
    )
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
    ema: float | None = _setting(
        None,
        "validate and keep an exponential moving average of the weights with this decay (0.999 is usual; less in the "
        "first steps)",
        number=(float, 0.0, 0.999999),
    )
    select_by: str = _setting("auc", "validation figure that the best checkpoint is chosen by", "auc", "loss")

    device: str = _setting("auto", "device: auto takes CUDA if there is one", "auto", "cpu", "cuda")
    precision: str = _setting("32-true", "numeric precision, in Lightning Fabric's names", *PRECISIONS)
    channels_last: bool = _setting(
        True,
        "store activations channels-last, the fastest layout of the fused operators (not on CPUs below 16 "
        "base_channels, where torch 2.13 corrupts memory)",
    )
    deterministic: bool = _setting(False, "ask torch for deterministic algorithms where it has them, slower on CUDA")
    sync_batchnorm: bool = _setting(
        False, "under torchrun, take the statistics of BatchNorm over the batches of all processes"
    )
    seed: int = _setting(0, "seed of weights, split, order and augmentation", number=(int, 0, 2**32 - 1))

    save_steps: int | None = _setting(
        None, "write last.pt after every so many steps too, not only after epochs", number=(int, 1, _INF)
    )
    keep_checkpoints: int = _setting(
        1, "how many checkpoints before last.pt to keep, in case it is damaged: last-1.pt, ...", number=(int, 0, 100)
    )
    log_steps: int | None = _setting(
        None, "write loss, learning rate and waiting time to steps.csv every so many steps", number=(int, 1, _INF)
    )
    tensorboard: bool = _setting(False, "write the same figures for TensorBoard (needs tensorboardX)")

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
        if self.stain != "macenko" and self.stain_fit == "slide":
            raise ValueError(f"stain_fit='slide' with stain={self.stain!r}; it belongs to stain='macenko'.")
        if self.zoom[0] > self.zoom[1]:
            raise ValueError(f"zoom={self.zoom!r}; expected the smaller factor first.")
        if self.norm == "batch" and self.num_groups is not None:
            raise ValueError(f"num_groups={self.num_groups} with norm='batch'; it belongs to norm='group'.")
        if self.sync_batchnorm and not self.fused:
            raise ValueError(
                "sync_batchnorm=True with fused=False; statistics over processes need the fused shortcuts."
            )
        self._check_model()

    def _check_model(self) -> None:
        """A network that there is, and none of the settings that it does not have."""
        if self.model in ER_MODELS:
            return
        foreign = ["norm", "num_groups", "fused", "memory"]
        if self.is_timm:
            foreign += ["block", "base_channels"]
            if importlib.util.find_spec("timm") is None:
                raise ValueError(
                    f"model={self.model!r}; expected one of {', '.join(ER_MODELS + PLAIN_MODELS)}. Other names are "
                    "timm's, which is not installed: pip install 'ernet_fast[timm]'."
                )
        defaults = {item.name: item.default for item in fields(self)}
        wrong = [f"{name}={getattr(self, name)!r}" for name in foreign if getattr(self, name) != defaults[name]]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} with model={self.model!r}, which has no such setting; drop it.")

    @property
    def is_timm(self) -> bool:
        """Whether `model` is one of timm's."""
        return self.model not in ER_MODELS + PLAIN_MODELS

    def departures(self) -> dict[str, tuple[Any, Any]]:
        """Settings that are not those of `protocol`: name to (the protocol's, this run's)."""
        preset = {} if self.protocol is None else PROTOCOLS[self.protocol]
        return {name: (value, getattr(self, name)) for name, value in preset.items() if getattr(self, name) != value}

    @classmethod
    def of_protocol(cls, protocol: str, **settings: Any) -> TrainConfig:
        """The settings of a protocol, `settings` in place of some. Raises ValueError for an unknown name."""
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol={protocol!r}; expected one of {', '.join(map(repr, PROTOCOLS))}.")
        return cls(**(PROTOCOLS[protocol] | settings | {"protocol": protocol}))

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
        lists = ("magnifications", *(item.name for item in fields(cls) if item.metadata["pair"]))
        found: dict[str, Any] = {k: tuple(v) if k in lists and isinstance(v, list) else v for k, v in values.items()}
        return cls(**found)

    @property
    def folder(self) -> Path:
        """`out` as a path."""
        return Path(self.out)


def check_same_run(saved: dict[str, Any], config: TrainConfig) -> None:
    """Raise ValueError if `config` would not continue the run that was saved, naming each difference.

    More epochs than were planned are a continuation where the learning rate does not depend on their number.
    """
    now = config.to_dict()
    # settings that came after the version that saved the run had their default then
    defaults = {item.name: item.default for item in fields(TrainConfig) if item.default is not MISSING}
    saved = {name: list(v) if isinstance(v, tuple) else v for name, v in defaults.items()} | saved
    changed = [name for name in now if name not in FREE and saved.get(name) != now[name]]
    if changed == ["epochs"] and now["epochs"] > saved["epochs"]:
        if config.schedule == "constant":
            return
        raise ValueError(
            f"epochs was {saved['epochs']}, now {now['epochs']}: with schedule={config.schedule!r} the learning rate "
            "of every step depends on the number of epochs, and the run cannot be prolonged; with schedule='constant' "
            f"it could. Start a new run from its weights: --weights {config.folder / 'last.pt'}."
        )
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
    elif metadata["pair"]:
        if not isinstance(value, tuple) or len(value) != 2:
            raise TypeError(f"{name}={value!r}; expected a pair of numbers.")
        for single in value:
            _check_value(name, single, annotation, {**metadata, "pair": False})
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
        raise TypeError(f"{name}={value!r}; expected {'a name' if name == 'model' else 'a path'}.")
