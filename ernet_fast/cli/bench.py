"""``ernet-fast bench``: this machine, this library, and what else is installed."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ernet_fast.benchmark import BenchmarkConfig, run_benchmark
from ernet_fast.benchmark.model import ModelBenchConfig, run_model_bench
from ernet_fast.benchmark.networks import MODELS
from ernet_fast.benchmark.run import DEVICES, KINDS
from ernet_fast.benchmark.show import answer_text, picture
from ernet_fast.benchmark.show_model import model_picture, model_text
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
    add_model_parser(parser.add_subparsers(title="more", metavar="[model]"), parents)


def add_model_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `bench model`."""
    default = ModelBenchConfig()
    parser = commands.add_parser(
        "model",
        parents=parents,
        help="training step, memory and inference of an ER-ResNet beside a plain ResNet and DenseNet-121",
        description="Time a training step and inference of an ER-ResNet (usual and lean memory), of its naive "
        "composition (eager and under torch.compile), of the plain ResNet of the same depth and of DenseNet-121, "
        "interleaved, and measure the memory that their tensors take in a step. Float32, channels-last, random images. "
        "Nothing is reported if the ER-ResNet does not compute what the naive one does.",
    )
    parser.add_argument("--model", choices=MODELS, default=default.model, help=f"default: {default.model}")
    parser.add_argument("--batch", type=int, default=default.batch, metavar="N", help=f"default: {default.batch}")
    size = f"pixels a side (default: {default.size})"
    parser.add_argument("--size", type=int, default=default.size, metavar="PIXELS", help=size)
    seconds = (
        f"about how long to time, at least five rounds; memory and compiling come on top (default: {default.seconds:g})"
    )
    parser.add_argument("--seconds", type=float, default=default.seconds, metavar="S", help=seconds)
    parser.add_argument("--device", choices=DEVICES, default=default.device, help="default: auto")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", metavar="FOLDER", help=f"for model.json and model.png (default: {FOLDER})")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON; writes files with --out alone")
    parser.set_defaults(run=run_model)


def run_model(arguments: argparse.Namespace) -> int:
    """Measure networks; returns 0."""
    config = ModelBenchConfig(
        arguments.model, arguments.batch, arguments.size, arguments.seconds, arguments.device, not arguments.no_compile
    )
    measure = functools.partial(run_model_bench, config)
    return _report(arguments, measure, "model", model_picture, lambda figures: [model_text(figures)])


def run(arguments: argparse.Namespace) -> int:
    """Measure; returns 0."""
    config = BenchmarkConfig(
        arguments.seconds, arguments.device, arguments.only, not arguments.no_compile, arguments.images
    )

    def texts(figures: dict[str, Any]) -> list[str]:
        return [answer_text(answer) for answer in figures["answers"]]

    return _report(arguments, functools.partial(run_benchmark, config), "bench", picture, texts)


def _report(
    arguments: argparse.Namespace,
    measure: Callable[[Reporter], dict[str, Any]],
    name: str,
    draw: Callable[[dict[str, Any], Path], None],
    texts: Callable[[dict[str, Any]], list[str]],
) -> int:
    """Measure, write NAME.json and NAME.png, and print tables, or JSON."""
    folder = None if arguments.json and arguments.out is None else Path(arguments.out or FOLDER)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    reporter = Reporter(quiet=arguments.quiet)
    figures = measure(reporter)
    if not figures["compiled_operators"]:
        reporter.warning("the compiled operators are not there, so this is the reference; see ernet-fast doctor")
    if folder is not None:
        write_json(folder / f"{name}.json", figures)
        try:
            draw(figures, folder / f"{name}.png")
        except ImportError as error:
            reporter.warning(f"no picture: {error}")
    if arguments.json:
        print_json(figures)
        return 0
    machine, torch = figures["machine"], figures["packages"]["torch"]
    device = figures.get("device_name", figures["device"])
    print(f"{processor_text(machine['cpu'], figures['isa'])}, {machine['cores']} cores; {device}; torch {torch}")
    if caches := caches_text(machine["cpu"]):
        print(caches)
    for text in texts(figures):
        print(f"\n{text}")
    if folder is not None:
        print(f"\nwritten to {folder}")
    return 0
