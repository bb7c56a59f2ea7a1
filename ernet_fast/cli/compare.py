"""``ernet-fast compare``: the figures of two runs on the same images, and whether they differ."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ernet_fast.cli.streams import print_json
from ernet_fast.console.atomic_file import write_json
from ernet_fast.console.progress import Reporter
from ernet_fast.console.tables import format_table
from ernet_fast.data.splits import SPLIT_NAMES
from ernet_fast.train import Bootstrap, Predictions, compare, evaluate
from ernet_fast.train.comparison import HEADER, TABLE, difference_rows, read_predictions
from ernet_fast.train.config import FREE

_FEW = 20
"""Patients below which percentile intervals are known to be too narrow."""


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "compare",
        parents=parents,
        help="compare two runs on the same images",
        description="Differences (second - first) of all figures of two runs on the same images, with intervals of the "
        "paired bootstrap and p-values of the paired permutation test, over patients. A folder that `evaluate --out` "
        "wrote is read; a run or a checkpoint is evaluated.",
    )
    add = parser.add_argument
    add("runs", metavar="RUN", nargs=2, help="folder of evaluate --out, folder of a run, or a checkpoint")
    add("--data", metavar="FOLDER", help="images to evaluate on; default: those of each training")
    add("--split", choices=SPLIT_NAMES, default="test", help="which part of them (default: test)")
    add("--split-file", metavar="FILE", help="CSV split instead of each training's")
    add("--resamples", type=int, metavar="N", default=2000, help="draws of patients (default: 2000)")
    add("--seed", type=int, metavar="N", default=0, help="of the draws (default: 0)")
    add("--by-magnification", action="store_true", help="also print the differences at each magnification")
    add("--num-workers", type=int, metavar="N", default=0, help="processes that read images (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--out", metavar="FILE", help="write everything as JSON there")
    add("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare; returns the exit code."""
    bootstrap = Bootstrap(arguments.resamples, seed=arguments.seed)
    (first, its), (second, others) = (_open(path, arguments) for path in arguments.runs)
    found = compare(first, second, bootstrap, settings=(its, others))
    values = {"first": arguments.runs[0], "second": arguments.runs[1], **found.to_dict()}
    if arguments.out is not None:
        write_json(arguments.out, values)
    if arguments.json:
        print_json(values)
        return 0
    print(f"first   {arguments.runs[0]}\nsecond  {arguments.runs[1]}")
    for name, pair in found.settings.items():
        print(f"        {name}: {pair[0]}, {pair[1]}")
    kind = f"{100 * bootstrap.level:g} % intervals of {bootstrap.resamples} resamples, seed {bootstrap.seed}"
    print(f"{found.images} images of {found.patients} patients; {kind}\n")
    print(format_table(HEADER, difference_rows(found.overall)))
    if arguments.by_magnification:
        for name, differences in found.by_magnification.items():
            print(f"\n{name}\n" + format_table(HEADER, difference_rows(differences)))
    print("\np: of no difference, for one figure chosen beforehand; with many figures some are small by chance.")
    if found.patients < _FEW:
        print(f"With {found.patients} patients the intervals are too narrow.")
    return 0


def _open(path: str, arguments: argparse.Namespace) -> tuple[Predictions, dict[str, Any]]:
    """Predictions of a run, and the settings of its training as far as they are known and matter."""
    folder = Path(path)
    if (folder / TABLE).is_file():
        record = folder / "metrics.json"
        settings = json.loads(record.read_text(encoding="utf-8")).get("settings", {}) if record.is_file() else {}
        return read_predictions(folder), _telling(settings)
    names = ("data", "split", "split_file", "num_workers", "device")
    options = {name: getattr(arguments, name) for name in names}
    result = evaluate(path, bootstrap=None, reporter=Reporter(quiet=arguments.quiet), **options)
    return result.predictions, _telling(result.settings)


def _telling(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in FREE}
