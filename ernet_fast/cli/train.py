"""``ernet-fast train``: train an ER-ResNet on images in the BreakHis layout."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from ernet_fast.cli.json_output import print_json
from ernet_fast.console.progress import Reporter
from ernet_fast.train import TrainConfig, fit, load_checkpoint
from ernet_fast.train.device import finish_together

_GROUPS = (
    ("data", ("data", "out", "target", "magnifications", "split_by", "fold", "num_folds", "split_file", "on_error",
              "max_train_images", "max_val_images")),
    ("images", ("stain", "stain_target", "image_size", "resize", "augment", "cache", "num_workers")),
    ("network", ("model", "block", "base_channels", "norm", "num_groups", "fused", "weights")),
    ("training", ("epochs", "batch_size", "optimizer", "lr", "weight_decay", "momentum", "schedule", "warmup_epochs",
                  "class_weights", "label_smoothing", "clip_norm", "select_by")),
    ("machine", ("device", "precision", "channels_last", "deterministic", "seed")),
)  # fmt: skip


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command; its options are the fields of `TrainConfig`."""
    parser = commands.add_parser(
        "train",
        parents=parents,
        help="train an ER-ResNet",
        description="Train an ER-ResNet on images in the BreakHis layout, with validation on other patients.",
        epilog="Several GPUs: torchrun --nproc-per-node=4 -m ernet_fast train ...",
    )
    for title, names in _GROUPS:
        group = parser.add_argument_group(title)
        for name in names:
            _add_setting(group, name)
    group = parser.add_argument_group("run")
    group.add_argument("--resume", action="store_true", help="continue the run in --out with its settings")
    group.add_argument("--stop-after", type=int, metavar="N", help="end after N epochs of this call; --resume goes on")
    group.add_argument("--json", action="store_true", help="print history and best epoch as JSON")
    parser.set_defaults(run=run)


def _add_setting(group: Any, name: str) -> None:
    """An option for one field; it leaves no trace in the arguments unless it is given."""
    item = next(item for item in fields(TrainConfig) if item.name == name)
    option, metadata = f"--{name.replace('_', '-')}", item.metadata
    meaning = metadata["meaning"].replace("%", "%%")
    common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
    if isinstance(item.default, bool):
        state = "on" if item.default else "off"
        group.add_argument(
            option, action=argparse.BooleanOptionalAction, help=f"{meaning} (default: {state})", **common
        )
        return
    optional = item.default is None or name in ("data", "out")
    help_text = meaning if optional else f"{meaning} (default: {item.default})"
    if metadata["choices"] is not None:
        group.add_argument(option, choices=metadata["choices"], help=help_text, **common)
    elif metadata["number"] is not None:
        kind = metadata["number"][0]
        group.add_argument(option, type=kind, metavar="N" if kind is int else "X", help=help_text, **common)
    elif name == "magnifications":
        group.add_argument(option, type=int, nargs="+", metavar="M", help=help_text, **common)
    else:
        metavar = {"data": "FOLDER", "out": "FOLDER"}.get(name, "FILE")
        group.add_argument(option, metavar=metavar, help=help_text, **common)


def _config(arguments: argparse.Namespace) -> TrainConfig:
    """The settings given, on top of those of the run that is resumed."""
    given = {item.name: getattr(arguments, item.name) for item in fields(TrainConfig) if hasattr(arguments, item.name)}
    if "out" not in given:
        raise ValueError("--out is missing: the folder for checkpoints and history.")
    if arguments.resume:
        last = Path(given["out"]) / "last.pt"
        if not last.is_file():
            raise FileNotFoundError(f"nothing to resume: no last.pt in {given['out']!r}.")
        given = load_checkpoint(last)["config"] | given
    elif "data" not in given:
        raise ValueError("--data is missing: the folder with the images (BreakHis layout).")
    return TrainConfig.from_dict(given)


def run(arguments: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    if arguments.stop_after is not None and arguments.stop_after < 1:
        raise ValueError(f"--stop-after {arguments.stop_after}; expected a positive number of epochs.")
    first = int(os.environ.get("RANK", "0")) == 0
    reporter = Reporter(quiet=arguments.quiet, mute=not first)
    config = _config(arguments)
    try:
        result = fit(config, resume=arguments.resume, stop_after=arguments.stop_after, reporter=reporter)
    except KeyboardInterrupt:
        if (config.folder / "last.pt").is_file():
            reporter.warning(
                f"interrupted; ernet-fast train --out {config.out} --resume goes on from the last complete epoch"
            )
        raise
    finish_together()
    if not first:
        return 0
    if arguments.json:
        best = str(result.best_checkpoint) if result.best else None
        print_json({"folder": str(result.folder), "finished": result.finished, "checkpoint": best, "best": result.best,
                    "history": result.history})  # fmt: skip
        return 0
    if result.best:
        print(f"best epoch {result.best['epoch']}: {result.best_checkpoint}")
    if not result.finished:
        print(
            f"{len(result.history)} of {config.epochs} epochs done; continue with: ernet-fast train --out "
            f"{config.out} --resume"
        )
    else:
        print(f"next: ernet-fast evaluate {result.best_checkpoint} --out {result.folder / 'evaluation'}")
    return 0
