"""``ernet-fast train``: train an ER-ResNet, or a network to compare it with."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from ernet_fast.cli.streams import print_json
from ernet_fast.console.progress import Reporter
from ernet_fast.train import TrainConfig, TrainingStoppedError, fit, load_checkpoint
from ernet_fast.train.checkpoint import field_of
from ernet_fast.train.device import finish_together, is_first_process
from ernet_fast.train.protocols import PROTOCOLS
from ernet_fast.train.run_folder import LAST, newest_checkpoint

_GROUPS = {"data": "data", "stain": "images", "model": "network", "epochs": "training", "device": "machine"}
"""First field of each group of options -> its title."""
_METAVARS = {"data": "FOLDER", "out": "FOLDER", "packed": "FOLDER", "model": "NAME"}
STOPPED = 75
"""Exit code of a run that a signal stopped behind a checkpoint (EX_TEMPFAIL of sysexits.h: try again)."""


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command; its options are the fields of `TrainConfig`."""
    parser = commands.add_parser(
        "train",
        parents=parents,
        help="train an ER-ResNet, or a network to compare it with",
        description="Train an ER-ResNet, a plain ResNet or a model of timm, with validation on other patients. The "
        "images are BreakHis, one folder a class, or a CSV list.",
        epilog="Several GPUs: torchrun --nproc-per-node=4 -m ernet_fast train ... Exit code 75: a signal (SIGTERM, "
        "SIGUSR1) stopped the run behind a checkpoint, and --resume goes on.",
    )
    for item in fields(TrainConfig):
        if item.name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[item.name])
        add_setting(group, item)
    group = parser.add_argument_group("run")
    group.add_argument("--resume", action="store_true", help="continue the run in --out with its settings")
    group.add_argument("--stop-after", type=int, metavar="N", help="end after N epochs of this call; --resume goes on")
    group.add_argument("--json", action="store_true", help="print history and best epoch as JSON")
    parser.set_defaults(run=run)


def add_setting(group: Any, item: Field[Any]) -> None:
    """An option for one field; it leaves no trace in the arguments unless it is given."""
    meaning, choices, number = (item.metadata[key] for key in ("meaning", "choices", "number"))
    default = item.default
    kind: dict[str, Any] = {"metavar": _METAVARS.get(item.name, "FILE")}
    if isinstance(default, bool):
        kind, default = {"action": argparse.BooleanOptionalAction}, "on" if default else "off"
    elif choices is not None:
        kind = {"choices": choices}
    elif isinstance(default, tuple):
        kind, default = {"type": float, "nargs": 2, "metavar": "X"}, " ".join(f"{value:g}" for value in default)
    elif number is not None:
        kind = {"type": number[0], "metavar": "N" if number[0] is int else "X"}
    elif item.name == "magnifications":
        kind = {"type": int, "nargs": "+", "metavar": "M"}
    meaning = meaning.replace("%", "%%")
    if default is not None and default is not MISSING:
        meaning += f" (default: {default})"
    option = f"--{item.name.replace('_', '-')}"
    group.add_argument(option, dest=item.name, default=argparse.SUPPRESS, help=meaning, **kind)


def _config(arguments: argparse.Namespace) -> TrainConfig:
    """The settings given, on top of those of the run that is resumed."""
    given = {item.name: getattr(arguments, item.name) for item in fields(TrainConfig) if hasattr(arguments, item.name)}
    if "out" not in given:
        raise ValueError("--out is missing: the folder for checkpoints and history.")
    if arguments.resume:
        last, state, _ = newest_checkpoint(Path(given["out"]))
        saved = state["config"]
        with field_of(last, "config"):
            TrainConfig.from_dict(saved)
        return TrainConfig.from_dict(saved | given)
    if "data" not in given:
        raise ValueError("--data is missing: the folder or list of images.")
    return TrainConfig.from_dict(PROTOCOLS.get(given.get("protocol", ""), {}) | given)


def run(arguments: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    if arguments.stop_after is not None and arguments.stop_after < 1:
        raise ValueError(f"--stop-after {arguments.stop_after}; expected a positive number of epochs.")
    first = is_first_process()
    reporter = Reporter(quiet=arguments.quiet, mute=not first)
    config = _config(arguments)
    resume = f"ernet-fast train --out {config.out} --resume"
    try:
        result = fit(config, resume=arguments.resume, stop_after=arguments.stop_after, reporter=reporter)
    except TrainingStoppedError as stopped:
        finish_together()
        reporter.warning(f"{stopped}; to go on: {resume}")
        return STOPPED
    except (KeyboardInterrupt, OSError) as error:
        last = config.folder / LAST
        if last.is_file() and not isinstance(error, (FileExistsError, FileNotFoundError, NotADirectoryError)):
            done = load_checkpoint(last)["epoch"]
            reporter.warning(f"stopped with {done} of {config.epochs} epochs complete; to go on: {resume}")
        raise
    finish_together()
    if not first:
        return 0
    if arguments.json:
        best = str(result.best_checkpoint) if result.best else None
        done = {"folder": str(result.folder), "finished": result.finished, "checkpoint": best, "best": result.best}
        print_json({**done, "history": result.history})
        return 0
    if result.best:
        print(f"best epoch {result.best['epoch']}: {result.best_checkpoint}")
    if not result.finished:
        print(f"{len(result.history)} of {config.epochs} epochs done; continue with: {resume}")
    else:
        print(f"next: ernet-fast evaluate {result.best_checkpoint} --out {result.folder / 'evaluation'}")
    return 0
