"""Figures of single steps: steps.csv, and TensorBoard."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from ernet_fast._optional import require
from ernet_fast.console.atomic_file import write_csv

FILE, FOLDER = "steps.csv", "tensorboard"
COLUMNS = ("step", "epoch", "loss", "lr", "images_per_second", "data_wait")


class StepLog:
    """Appends to ``steps.csv`` of a run, and writes event files for TensorBoard.

    Lines and events of steps after `step`, which a run that was interrupted will do again, are dropped.

    Args:
        folder: of the run.
        step: the last step that counts.
        csv_file: write ``steps.csv``.
        tensorboard: write ``tensorboard/``.

    Raises:
        ImportError: `tensorboard`, and tensorboardX is not installed.
    """

    def __init__(self, folder: Path, step: int, *, csv_file: bool, tensorboard: bool) -> None:
        self._file: Any = None
        self._events: Any = None
        if tensorboard:
            package = require("tensorboardX", extra="tensorboard", purpose="writing TensorBoard event files")
            self._events = package.SummaryWriter(str(folder / FOLDER), purge_step=step + 1)
        if csv_file:
            write_csv(folder / FILE, [COLUMNS, *_rows_until(folder / FILE, step)])
            self._file = open(folder / FILE, "a", newline="", encoding="utf-8")

    def step(self, **figures: float) -> None:
        """The figures of a step, named as `COLUMNS`."""
        if self._file is not None:
            csv.writer(self._file, lineterminator="\n").writerow([figures[name] for name in COLUMNS])
            self._file.flush()
        self._add("train", {name: figures[name] for name in COLUMNS[2:]}, int(figures["step"]))

    def epoch(self, figures: dict[str, Any], step: int) -> None:
        """The figures of an epoch (flat; those that are no numbers are left out), which ended with `step`."""
        self._add("epoch", {key: v for key, v in figures.items() if isinstance(v, (int, float))}, step)

    def _add(self, group: str, figures: dict[str, float], step: int) -> None:
        if self._events is not None:
            for name, value in figures.items():
                self._events.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        """Bring everything to the files."""
        for target in (self._file, self._events):
            if target is not None:
                target.close()


def _rows_until(path: Path, step: int) -> list[list[str]]:
    """The lines of a file up to `step`; none of a file that is not there. A torn last line is dropped."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    return [row for row in rows if len(row) == len(COLUMNS) and row[0].isdecimal() and int(row[0]) <= step]
