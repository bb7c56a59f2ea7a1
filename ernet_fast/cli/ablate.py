"""``ernet-fast ablate``: networks x stain normalisation x folds x seeds, and a range test of what comes out."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ernet_fast.cli.failures import describe
from ernet_fast.cli.streams import print_json
from ernet_fast.console.progress import Reporter
from ernet_fast.data import write_split_csv
from ernet_fast.scale.shard import read_shard
from ernet_fast.train import TrainConfig, evaluate
from ernet_fast.train.ablation import SHORTCUTS, SPLIT, Cell, check_same_study, collect, grid, run_cells
from ernet_fast.train.ablation_intervals import read_draws
from ernet_fast.train.ablation_report import summary_text, write_summary
from ernet_fast.train.ablation_summary import summarise
from ernet_fast.train.bootstrap import FIGURES, Bootstrap
from ernet_fast.train.config import FREE
from ernet_fast.train.data_sets import open_split

_SWEPT = ("out", "model", "stain", "fold", "seed", "resume", "stop_after")
_STAINS = TrainConfig.__dataclass_fields__["stain"].metadata["choices"]


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "ablate",
        parents=parents,
        help="a study: networks x stain normalisation x folds x seeds",
        usage="ernet-fast ablate --out FOLDER [options] -- --data FOLDER [options of ernet-fast train]",
        description="Trains and evaluates every combination on one split, each in a folder of its own, and compares "
        "them by Tukey's range test. A study that was stopped goes on where it was; finished combinations are kept, "
        "so that others can be added later.",
    )
    add = parser.add_argument
    add("--out", metavar="FOLDER", required=True, help="folder of the study")
    add("--depths", type=int, nargs="+", metavar="N", default=[18], help="layers of the networks (default: 18)")
    kinds, both = tuple(SHORTCUTS), list(SHORTCUTS)
    add("--shortcuts", choices=kinds, nargs="+", default=both, help="resnetN, er_resnetN (default: both)")
    stains = list(_STAINS)
    add("--stains", nargs="+", metavar="S", default=stains, help=f"settings of train --stain (default: {stains})")
    add("--folds", type=int, nargs="+", metavar="N", default=[0, 1, 2, 3, 4], help="default: 0 1 2 3 4")
    add("--seeds", type=int, nargs="+", metavar="N", default=[0], help="of weights and order (default: 0)")
    add("--shard", metavar="I/N", help="do the I-th of N parts, or that which SLURM_ARRAY_TASK_ID says (auto)")
    add("--figure", choices=FIGURES, default="accuracy", help="what the range test compares (default: accuracy)")
    add("--alpha", type=float, metavar="X", default=0.05, help="its level (default: 0.05)")
    add(
        "--resamples",
        type=int,
        metavar="N",
        default=2000,
        help="draws of patients for intervals; 0: none (default: 2000)",
    )
    add("--table-only", action="store_true", help="train nothing: tables of what is finished")
    add("--json", action="store_true", help="print the summary as JSON")
    add("options", nargs="*", metavar="OPTION", help="options of ernet-fast train, behind --")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run or summarise a study; returns the exit code."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "ablate trains one cell a process: start it on each device with --shard I/N, without torchrun."
        )
    models = [f"{SHORTCUTS[kind]}{depth}" for depth in arguments.depths for kind in arguments.shortcuts]
    cells = grid(models, arguments.stains, arguments.folds, arguments.seeds)
    out, reporter = Path(arguments.out), Reporter(quiet=arguments.quiet)
    failed: tuple[tuple[Cell, str], ...] = ()
    if not arguments.table_only:
        study = _Study(out, arguments.options)
        study.prepare(cells[0])
        shard = None if arguments.shard is None else read_shard(arguments.shard)
        mine = cells if shard is None else cells[shard.index - 1 :: shard.count]
        outcome = run_cells(out, mine, study.train, study.judge, describe, reporter)
        failed = outcome.failed
        if outcome.stopped:
            reporter.warning("stopped by a signal; the same command goes on")
            return outcome.stopped
    results = collect(out, cells)
    if not results:
        reporter.warning(f"no cell of {out} is finished.")
        return 1
    draws = None
    if arguments.resamples:
        draws = read_draws(out, [result.cell for result in results], Bootstrap(arguments.resamples), reporter)
    summary = summarise(results, len(cells), arguments.figure, arguments.alpha, draws)
    page = write_summary(summary, out)
    if arguments.json:
        print_json({**summary.to_dict(), "failed": [{**cell._asdict(), "reason": why} for cell, why in failed]})
    else:
        print(f"{len(results)} of {len(cells)} cells finished\n\n{summary_text(summary)}\n\n{page}")
    return 3 if failed else 0


class _Study:
    """Cells as calls of ``ernet-fast train`` and `evaluate`, with the options behind ``--``."""

    def __init__(self, out: Path, options: Sequence[str]) -> None:
        self.out, self.options = out, list(options)
        swept = [text for text in self.options if re.match(rf"--({'|'.join(_SWEPT)})(=|$)".replace("_", "[-_]"), text)]
        if swept:
            raise ValueError(f"{', '.join(swept)} behind --: ablate sets {', '.join(_SWEPT[:5])} of each run itself.")

    def prepare(self, cell: Cell) -> None:
        """Fix what all cells share: their settings, and one split, unless one is named."""
        given = {name: value for name, value in vars(self._parse(cell, Path("cell"))).items() if name in _known()}
        if "data" not in given:
            raise ValueError("--data is missing: ernet-fast ablate --out FOLDER -- --data FOLDER")
        check_same_study(self.out, {k: v for k, v in given.items() if k not in (*FREE, *_SWEPT, "split_file")})
        if "split_file" not in given and not (self.out / SPLIT).exists():
            config = TrainConfig.from_dict(
                {name: value for name, value in given.items() if name not in ("model", "stain")}
            )
            splits = open_split(config, "trainval").splits
            assert splits is not None
            write_split_csv(self.out / SPLIT, splits)

    def _parse(self, cell: Cell, folder: Path, *more: str) -> argparse.Namespace:
        from ernet_fast.cli import build_parser

        split = ["--split-file", str(self.out / SPLIT)] if (self.out / SPLIT).exists() else []
        own = ["--out", str(folder), "--model", cell.model, "--stain", cell.stain]
        own += ["--fold", str(cell.fold), "--seed", str(cell.seed), "--quiet"]
        try:
            return build_parser().parse_args(["train", *split, *self.options, *own, *more])
        except SystemExit:  # argparse has said why
            raise ValueError(f"ernet-fast train does not take the options of cell {cell.name}, see above.") from None

    def train(self, cell: Cell, folder: Path, resume: bool) -> int:
        """One call of the command, and its exit code; what it prints is in the run's own files."""
        arguments = self._parse(cell, folder, *(["--resume"] if resume else []))
        with contextlib.redirect_stdout(io.StringIO()):
            return int(arguments.run(arguments))

    def judge(self, cell: Cell, folder: Path, into: Path) -> None:
        """Evaluate on the test images."""
        given = vars(self._parse(cell, folder))
        where = {name: given[name] for name in ("data", "device", "num_workers") if name in given}
        evaluate(folder, reporter=Reporter(quiet=True), **where).write_figures(into)


def _known() -> set[str]:
    return set(TrainConfig.__dataclass_fields__)
