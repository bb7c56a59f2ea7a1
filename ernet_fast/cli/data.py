"""``ernet-fast data verify``: whether a data set is whole and sound."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from ernet_fast.cli.streams import print_json
from ernet_fast.console.atomic_file import write_json
from ernet_fast.console.progress import Reporter
from ernet_fast.console.tables import format_table
from ernet_fast.data.layout import LABELS, MAGNIFICATIONS, SUBTYPES
from ernet_fast.data.published import IMAGES
from ernet_fast.data.verify import Verification, verify_data

UNSOUND = 3
_LISTED = 20


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("data", help="look at a data set", description="Look at a data set.")
    parts = parser.add_subparsers(title="parts", metavar="PART", dest="part", required=True)
    verify = parts.add_parser(
        "verify",
        parents=parents,
        help="whether it is whole and sound",
        description="Read every image of a folder in the BreakHis layout: counts by class and magnification against "
        "those published, duplicates by content, patients in two classes, files that cannot be used or read. Nothing "
        "is written to the folder.",
        epilog=f"Exit code 0: whole and sound; {UNSOUND}: something was found.",
    )
    add = verify.add_argument
    add("root", metavar="ROOT", help="BreaKHis_v1, histology_slides or any folder above them")
    add("--any-counts", action="store_true", help="do not compare counts: a part of the data set, or another")
    add("--workers", type=int, metavar="N", help="images decoded at the same time (default: one a core, at most 8)")
    add("--out", metavar="FILE.json", help="write everything that was found there, too")
    add("--json", action="store_true", help="print it as JSON")
    verify.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Verify; returns 0, or 3 if something was found."""
    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers {arguments.workers}; expected a positive number.")
    with ExitStack() as open_tasks:
        reporter = Reporter(quiet=arguments.quiet)

        def begin(count: int) -> Callable[[], None]:
            return open_tasks.enter_context(reporter.task("verify", count)).advance

        found = verify_data(
            arguments.root, compare_counts=not arguments.any_counts, workers=arguments.workers, begin=begin
        )
    figures = found.figures()
    if arguments.out is not None:
        write_json(arguments.out, figures)
    if arguments.json:
        print_json(figures)
    else:
        _print(found, figures)
    return 0 if found.is_sound else UNSOUND


def _print(found: Verification, figures: dict[str, Any]) -> None:
    print(f"{found.tree}: {figures['images']} images, {figures['patients']} patients, {figures['slides']} slides\n")
    print(format_table(["", *(f"{m}X" for m in MAGNIFICATIONS), "all"], _count_rows(found)))
    compared = found.differences is not None
    if compared:
        print("found/published where they differ" if found.differences else "as published")
    print()
    for title, lines in _findings(found, figures):
        print(f"{title}: {len(lines) or 'none'}")
        for line in lines[:_LISTED]:
            print(f"  {line}")
        if len(lines) > _LISTED:
            print(f"  and {len(lines) - _LISTED} more (--json lists all)")
    sizes = ", ".join(f"{count} of {size}" for size, count in figures["other_sizes"].items())
    print(f"sizes other than 460x700: {sizes or 'none'}")
    print("\nsound" if found.is_sound else "\nNOT sound")


def _count_rows(found: Verification) -> list[list[str]]:
    counts, compared = found.counts(), found.differences is not None

    def cell(codes: list[str], magnifications: tuple[int, ...]) -> str:
        there, wanted = (sum(table[code][m] for code in codes for m in magnifications) for table in (counts, IMAGES))
        return f"{there}/{wanted}" if compared and there != wanted else str(there)

    def row(name: str, codes: list[str]) -> list[str]:
        return [name, *(cell(codes, (m,)) for m in MAGNIFICATIONS), cell(codes, MAGNIFICATIONS)]

    rows = [row(f"{code} {kind.folder}", [code]) for code, kind in SUBTYPES.items()]
    for label, name in enumerate(LABELS):
        rows.append(row(name, [code for code, kind in SUBTYPES.items() if kind.malignant == label]))
    return [*rows, row("all", list(SUBTYPES))]


def _findings(found: Verification, figures: dict[str, Any]) -> list[tuple[str, list[str]]]:
    duplicates = []
    for group in figures["duplicates"]:
        across = "classes" if group["across_classes"] else "patients" if group["across_patients"] else ""
        duplicates.append(" = ".join(group["paths"]) + (f" (in several {across})" if across else ""))
    return [
        ("cannot be used", [f"{path}: {reason}" for path, reason in found.unusable]),
        ("cannot be read", [f"{path}: {reason}" for path, reason in found.unreadable]),
        ("equal images", duplicates),
        ("patients in two classes", list(found.mixed_patients)),
        (
            "patients of several tumour types (no fault)",
            [f"{patient}: {', '.join(codes)}" for patient, codes in found.several_types.items()],
        ),
    ]
