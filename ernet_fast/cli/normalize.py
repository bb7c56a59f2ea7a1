"""``ernet-fast normalize``: Macenko stain normalisation of files."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ernet_fast.cli.normalize_files import normalize_batches, normalize_files
from ernet_fast.cli.normalize_plan import READABLE, Job, Outcome, is_single, plan
from ernet_fast.cli.normalize_record import METHOD, claim, one_run_overwrites, settings_of
from ernet_fast.cli.streams import print_json
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
    add = parser.add_argument
    add("input", metavar="INPUT", help="an image, or a folder of images")
    add(
        "output", metavar="OUTPUT", help="folder for the normalised images, made if missing; for one image, also a file"
    )
    target = "image whose stains all others get; default: the reference stains published with Macenko's method"
    add("--target", metavar="IMAGE", help=target)
    formats = "file format: that of the input (JPEG at quality 95, TIFF with LZW), or PNG (default: keep)"
    add("--format", choices=("keep", "png"), default="keep", help=formats)
    overwrite = "replace outputs that exist (default: skip them, if they were made with the same settings)"
    add("--overwrite", action="store_true", help=overwrite)
    workers = "images processed, or with --device cuda read and written, at the same time (default: one a core)"
    add("--workers", type=int, metavar="N", default=os.cpu_count() or 1, help=workers)
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--json", action="store_true", help="print what became of every file as JSON")
    add = parser.add_argument_group("method").add_argument
    for option, default, meaning in (
        ("--Io", 240.0, "grey level of an empty slide"),
        ("--alpha", 1.0, "percentile of the extreme stain directions"),
        ("--beta", 0.15, "least optical density of tissue"),
    ):
        add(option, type=float, default=default, metavar="X", help=f"{meaning} (default: {default:g})")
    percentile = "linear as torchstain's NumPy backend, nearest as its torch backend (default: linear)"
    add("--percentile", choices=("linear", "nearest"), default="linear", help=percentile)
    degenerate = (
        "an image without stains to fit (background): take it to be stained like the target, copy it, or count it as "
        "failed (default: reference)"
    )
    add("--on-degenerate", choices=("reference", "identity", "raise"), default="reference", help=degenerate)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Normalise; returns 0, or 1 if a file failed."""
    if arguments.workers < 1:
        raise ValueError(f"--workers {arguments.workers}; expected a positive number.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device here.")
    normalizer = MacenkoNormalizer(layout="CHW", **{name: getattr(arguments, name) for name in METHOD})
    if arguments.target is not None:
        try:
            normalizer.fit(read_image(arguments.target))
        except ValueError as error:
            raise ValueError(f"--target {arguments.target}: {error}") from error
    source, output = Path(arguments.input), Path(arguments.output)
    files, ignored = plan(source, output, as_png=arguments.format == "png")
    if is_single(source, output):
        if output.exists() and not arguments.overwrite:
            raise FileExistsError(f"{str(output)!r} exists; --overwrite replaces it.")
        outcomes = _work(arguments, files, normalizer)
    else:
        with one_run_overwrites(output, overwrite=arguments.overwrite):
            claim(output, files, settings_of(normalizer, arguments.target), overwrite=arguments.overwrite)
            outcomes = _work(arguments, files, normalizer)
    outcomes = sorted([*outcomes, *ignored], key=lambda outcome: outcome.input)
    counts = Counter(outcome.status for outcome in outcomes)
    if arguments.json:
        print_json({"counts": dict(sorted(counts.items())), "files": [asdict(outcome) for outcome in outcomes]})
    else:
        for status, limit in (("failed", len(outcomes)), ("degenerate", _LISTED), ("skipped", _LISTED)):
            found = [outcome for outcome in outcomes if outcome.status == status]
            for outcome in found[:limit]:
                print(f"{outcome.status:<10}  {outcome.input}: {outcome.reason}")
            if len(found) > limit:
                print(f"... and {len(found) - limit} more {status}; --json lists all")
        order = ("normalised", "degenerate", "skipped", "failed")
        shown = ", ".join(f"{counts[status]} {status}" for status in order if counts[status])
        print(f"{shown or 'nothing to do'}; written to {arguments.output}")
    return 1 if counts["failed"] else 0


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

        options: dict[str, Any] = {"overwrite": arguments.overwrite, "workers": arguments.workers, "advance": advance}
        try:
            return work(files, normalizer.to(arguments.device), **options)
        except (KeyboardInterrupt, OSError):
            reporter.warning(f"stopped after {done} of {len(files)} files; run again to go on with the others")
            raise
