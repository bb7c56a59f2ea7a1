"""Evaluation of a checkpoint on a folder of images."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ernet_fast.console.atomic_file import remove_abandoned, write_json
from ernet_fast.console.progress import Reporter
from ernet_fast.data import Splits, parse_name
from ernet_fast.train.bootstrap import Bootstrap
from ernet_fast.train.checkpoint import field_of, load_checkpoint, load_network
from ernet_fast.train.config import TrainConfig
from ernet_fast.train.data_sets import open_split
from ernet_fast.train.device import build_fabric, evaluation_pass, is_first_process
from ernet_fast.train.findings import Findings
from ernet_fast.train.images import ImageSet, build_loader, evenly_chosen
from ernet_fast.train.mistakes import Mistake, find_mistakes
from ernet_fast.train.network import build_network, uses_channels_last
from ernet_fast.train.predictions import Predictions, predict
from ernet_fast.train.run_folder import find_checkpoint
from ernet_fast.train.run_report import write_run_report
from ernet_fast.train.stain_choice import StainNormalization


class Evaluation(Findings):
    """`Findings` that can be written to files."""

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write `report.html` with its pictures, `metrics.json` and `predictions.csv` into `folder`; returns it."""
        folder = self.write_figures(folder)
        write_run_report(self, folder)
        return folder

    def write_figures(self, folder: str | os.PathLike[str]) -> Path:
        """Write `predictions.csv` and then `metrics.json`, and no more; returns the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)
        self.predictions.write_csv(folder / "predictions.csv")
        write_json(folder / "metrics.json", self.figures())
        return folder


def evaluate(
    checkpoint: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    split: str = "test",
    magnifications: tuple[int, ...] | None = None,
    split_file: str | os.PathLike[str] | None = None,
    max_images: int | None = None,
    batch_size: int | None = None,
    num_workers: int = 0,
    device: str = "auto",
    on_error: str | None = None,
    bootstrap: Bootstrap | None = Bootstrap(),  # noqa: B008, frozen
    mistakes: int = 0,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Run the network of a checkpoint over a part of the data, prepared as in its training (size, stain normalisation).

    Args:
        checkpoint: a file of `fit`, or the folder of a run, which stands for its `best.pt`.
        data: folder with images; default: that of the training.
        split: ``"test"``, ``"val"``, ``"train"``, ``"trainval"`` or ``"all"`` (any images, whatever their names are in
            the split). The split is the training's, which the checkpoint holds: `data` must have its images and no
            others, unless on_error is ``"skip"``.
        magnifications: default: those of the training.
        split_file: a CSV split instead of the training's.
        max_images: look at no more than this many images, evenly chosen.
        batch_size: default: that of the training.
        num_workers: processes that read images.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        on_error: ``"raise"`` or ``"skip"`` for unusable images; default: as in training.
        bootstrap: how the intervals of all figures are made; None makes none.
        mistakes: keep this many of the worst mistakes, each with its Grad-CAM map.
        reporter: where progress goes; default: stderr.

    Raises:
        FileNotFoundError, ValueError: checkpoint or data are missing, damaged or do not fit.
    """
    if mistakes < 0:
        raise ValueError(f"mistakes={mistakes}; expected 0 or more.")
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images={max_images}; expected a positive number.")
    path = find_checkpoint(checkpoint)
    state = load_checkpoint(path)
    changes: dict[str, Any] = {"data": data, "split_file": split_file}
    changes = {name: None if path is None else os.fspath(path) for name, path in changes.items()}
    changes |= {"magnifications": magnifications, "batch_size": batch_size, "num_workers": num_workers}
    changes |= {"device": device, "on_error": on_error}
    with field_of(path, "config"):
        saved = TrainConfig.from_dict(state["config"] | {"weights": None})
    with field_of(path, "split"):
        own = split_file is None and split != "all" and state["split"] is not None
        splits = Splits.from_dict(state["split"]) if own else None
    config = replace(saved, **{name: value for name, value in changes.items() if value is not None})
    opened = open_split(config, split, splits, any_images=split == "all" and split_file is None)
    if tuple(opened.classes) != tuple(state["classes"]):
        raise ValueError(f"the data has classes {opened.classes}, the checkpoint {state['classes']}.")
    chosen, stain = evenly_chosen(opened.samples, max_images), StainNormalization.from_state(state["stain"])
    images = ImageSet(chosen, config.image_size, resize=config.resize, normalizer=stain)
    reporter = reporter or Reporter()
    trained_on = set(state["train_images"])
    seen_images = sum(sample.name in trained_on for sample in images.samples)
    patients = {parse_name(f"{name}.png").patient for name in trained_on}
    seen_patients = len({sample.patient for sample in images.samples} & patients)
    if seen_patients and split not in ("train", "trainval"):
        reporter.warning(
            f"the network was trained on {seen_images} of these images and on {seen_patients} of their patients: "
            "the figures do not measure how it does on new patients."
        )
    predictions, worst = _predict(config, state, path, images, mistakes, reporter)
    settings = config.to_dict() | {"max_images": max_images}
    inputs = {name: settings[name] for name in ("data", "magnifications", "split_file", "max_images")}
    return Evaluation(
        predictions, path, state["epoch"], split, tuple(opened.skipped), seen_images, seen_patients, inputs,
        settings=state["config"], history=state["history"], bootstrap=bootstrap, mistakes=worst,
    )  # fmt: skip


def _predict(
    config: TrainConfig, state: dict[str, Any], path: Path, images: ImageSet, mistakes: int, reporter: Reporter
) -> tuple[Predictions, tuple[Mistake, ...]]:
    fabric = build_fabric(config.device, config.precision)
    network = build_network(config, len(state["classes"]))
    load_network(network, state, path)
    channels_last = uses_channels_last(config, fabric.device)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = fabric.strategy.precision.convert_module(network).to(fabric.device)
    batches, _ = build_loader(
        images, batch_size=config.batch_size, shuffle=False, num_workers=config.num_workers, fabric=fabric
    )
    forward = evaluation_pass(fabric, network, channels_last)
    with reporter.task("evaluate", len(images)) as task:
        found = predict(network, forward, batches, images.samples, state["classes"], advance=task.advance)
    worst = find_mistakes(network, forward, images, found, mistakes) if mistakes and is_first_process() else ()
    return found, worst
