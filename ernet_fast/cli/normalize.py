"""``ernet-fast normalize``: Macenko stain normalisation of files."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ernet_fast.cli.json_output import print_json
from ernet_fast.cli.normalize_batches import normalize_batches
from ernet_fast.cli.normalize_files import normalize_files
from ernet_fast.cli.normalize_plan import READABLE, Job, Outcome, is_single, plan
from ernet_fast.cli.normalize_record import claim, settings_of
from ernet_fast.console.atomic_file import remove_abandoned
from ernet_fast.console.progress import Reporter
from ernet_fast.data import read_image
from ernet_fast.stain import MacenkoNormalizer

_LISTED = 20


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "normalize",
        parents=parents,
        help="normalise the stains of images",
        description=f"Give every image the stains of a target (Macenko et al., ISBI 2009). Reads {READABLE}; folders "
        "are searched with all their subfolders, whose structure is kept. Inputs are never overwritten.",
    )
    parser.add_argument("input", metavar="INPUT", help="an image, or a folder of images")
    parser.add_argument(
        "output", metavar="OUTPUT", help="folder for the normalised images, made if missing; for one image, also a file"
    )
    parser.add_argument(
        "--target",
        metavar="IMAGE",
        help="image whose stains all others get; default: the reference stains published with Macenko's method",
    )
    parser.add_argument(
        "--format",
        choices=("keep", "png"),
        default="keep",
        help="file format: that of the input (JPEG at quality 95, TIFF with LZW), or PNG (default: keep)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace outputs that exist (default: skip them, if they were made with the same settings)",
    )
    workers = os.cpu_count() or 1
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        default=workers,
        help="images processed, or with --device cuda read and written, at the same time (default: one a core)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--json", action="store_true", help="print what became of every file as JSON")
    _add_method(parser.add_argument_group("method"))
    parser.set_defaults(run=run)


def _add_method(group: Any) -> None:
    """The constants of Macenko's method."""
    numbers = (
        ("--Io", 240.0, "grey level of an empty slide"),
        ("--alpha", 1.0, "percentile of the extreme stain directions"),
        ("--beta", 0.15, "least optical density of tissue"),
    )
    for option, default, meaning in numbers:
        group.add_argument(option, type=float, default=default, metavar="X", help=f"{meaning} (default: {default:g})")
    group.add_argument(
        "--percentile",
        choices=("linear", "nearest"),
        default="linear",
        help="linear as torchstain's NumPy backend, nearest as its torch backend (default: linear)",
    )
    group.add_argument(
        "--on-degenerate",
        choices=("reference", "identity", "raise"),
        default="reference",
        help="an image without stains to fit (background): take it to be stained like the target, copy it, or count "
        "it as failed (default: reference)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Normalise; returns 0, or 1 if a file failed."""
    if arguments.workers < 1:
        raise ValueError(f"--workers {arguments.workers}; expected a positive number.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device here.")
    normalizer = MacenkoNormalizer(
        Io=arguments.Io,
        alpha=arguments.alpha,
        beta=arguments.beta,
        percentile=arguments.percentile,
        on_degenerate=arguments.on_degenerate,
        layout="CHW",
    )
    if arguments.target is not None:
        try:
            normalizer.fit(read_image(arguments.target))
        except ValueError as error:
            raise ValueError(f"--target {arguments.target}: {error}") from error
    source, output = Path(arguments.input), Path(arguments.output)
    files, ignored = plan(source, output, as_png=arguments.format == "png")
    if not is_single(source, output):
        claim(output, files, settings_of(normalizer, arguments.target), overwrite=arguments.overwrite)
    elif output.exists() and not arguments.overwrite:
        raise FileExistsError(f"{str(output)!r} exists; --overwrite replaces it.")
    outcomes = sorted([*_work(arguments, files, normalizer), *ignored], key=lambda outcome: outcome.input)
    if arguments.json:
        counts = Counter(outcome.status for outcome in outcomes)
        print_json({"counts": dict(sorted(counts.items())), "files": [asdict(outcome) for outcome in outcomes]})
    else:
        _print_summary(outcomes, arguments.output)
    return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0


def _work(arguments: argparse.Namespace, files: list[Job], normalizer: MacenkoNormalizer) -> list[Outcome]:
    """Do all files; when that is cut short, say how far it came."""
    reporter = Reporter(quiet=arguments.quiet)
    for folder in {job.output.parent for job in files}:
        if folder.is_dir():
            remove_abandoned(folder)
    work = normalize_batches if arguments.device == "cuda" else normalize_files
    done = 0
    with reporter.task("normalise", len(files)) as task:

        def advance() -> None:
            nonlocal done
            done += 1
            task.advance(1)

        try:
            return work(
                files,
                normalizer.to(arguments.device),
                overwrite=arguments.overwrite,
                workers=arguments.workers,
                advance=advance,
            )
        except (KeyboardInterrupt, OSError):
            reporter.warning(f"stopped after {done} of {len(files)} files; run again to go on with the others")
            raise


def _print_summary(outcomes: list[Outcome], folder: str) -> None:
    """A line for each failure, then for some of those that were not simply normalised, then the counts."""
    for status, limit in (("failed", len(outcomes)), ("degenerate", _LISTED), ("skipped", _LISTED)):
        found = [outcome for outcome in outcomes if outcome.status == status]
        for outcome in found[:limit]:
            print(f"{outcome.status:<10}  {outcome.input}: {outcome.reason}")
        if len(found) > limit:
            print(f"... and {len(found) - limit} more {status}; --json lists all")
    counts = Counter(outcome.status for outcome in outcomes)
    shown = ", ".join(
        f"{counts[status]} {status}" for status in ("normalised", "degenerate", "skipped", "failed") if counts[status]
    )
    print(f"{shown or 'nothing to do'}; written to {folder}")
