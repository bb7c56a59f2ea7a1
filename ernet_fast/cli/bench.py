"""``ernet-fast bench``: this machine, this library, and what else is installed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ernet_fast.benchmark import BenchmarkConfig, run_benchmark
from ernet_fast.benchmark.run import DEVICES, KINDS
from ernet_fast.benchmark.show import answer_text, picture
from ernet_fast.cli.streams import print_json
from ernet_fast.console.atomic_file import write_json
from ernet_fast.console.progress import Reporter
from ernet_fast.processor import caches_text, processor_text

FOLDER = "ernet-fast-bench"


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command."""
    default = BenchmarkConfig()
    parser = commands.add_parser(
        "bench",
        parents=parents,
        help="time the library on this machine against the packages that are installed, in two minutes",
        description="Time Macenko normalisation and ER shortcuts on this machine, interleaved with torchstain, stainx, "
        "torch-staintools, tiatoolbox, PyTorch and torch.compile, as far as they are installed. Results are compared "
        "before anything is timed: nothing is reported if the library's own are wrong, and packages that compute "
        "something else are marked.",
    )
    seconds = f"about how long to measure; compiling comes on top (default: {default.seconds:g})"
    parser.add_argument("--seconds", type=float, default=default.seconds, metavar="S", help=seconds)
    parser.add_argument("--device", choices=DEVICES, default=default.device, help="default: auto")
    parser.add_argument("--only", choices=KINDS, help="one half of it")
    images = (
        "normalise images of this folder (PNG, JPEG, TIFF; cut to 224 x 224 and 700 x 460) instead of generated ones"
    )
    parser.add_argument("--images", metavar="FOLDER", help=images)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", metavar="FOLDER", help=f"for bench.json and bench.png (default: {FOLDER})")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON; writes files with --out alone")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure; returns 0."""
    config = BenchmarkConfig(
        arguments.seconds, arguments.device, arguments.only, not arguments.no_compile, arguments.images
    )
    folder = None if arguments.json and arguments.out is None else Path(arguments.out or FOLDER)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    reporter = Reporter(quiet=arguments.quiet)
    figures = run_benchmark(config, reporter)
    if not figures["compiled_operators"]:
        reporter.warning("the compiled operators are not there, so this is the reference; see ernet-fast doctor")
    if folder is not None:
        write_json(folder / "bench.json", figures)
        try:
            picture(figures, folder / "bench.png")
        except ImportError as error:
            reporter.warning(f"no picture: {error}")
    if arguments.json:
        print_json(figures)
        return 0
    machine, device, torch = figures["machine"], figures["device"], figures["packages"]["torch"]
    print(f"{processor_text(machine['cpu'], figures['isa'])}, {machine['cores']} cores; {device}; torch {torch}")
    if caches := caches_text(machine["cpu"]):
        print(caches)
    for answer in figures["answers"]:
        print(f"\n{answer_text(answer)}")
    if folder is not None:
        print(f"\nwritten to {folder}")
    return 0
