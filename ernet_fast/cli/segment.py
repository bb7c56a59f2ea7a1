"""``ernet-fast segment``: nuclei of images."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from ernet_fast.cli.streams import print_json
from ernet_fast.console.progress import Reporter
from ernet_fast.console.tables import format_table
from ernet_fast.segment import FileNuclei, NucleiSettings, segment_files
from ernet_fast.segment.files import BREAKHIS

SOME_FAILED = 3
_MEANINGS = {
    "finest": "standard deviation of the Gaussian that removes noise, um",
    "coarsest": "standard deviation of the Gaussian that finds the background, um",
    "contrast": "least haematoxylin above the background, optical density",
    "share": "least haematoxylin, as a share of the image's 99th percentile",
    "thinnest": "what is thinner is removed, um",
    "separation": "least distance between two nuclei that touch, um",
    "smooth": "smoothing of the distance transform, um",
    "min_area": "least area of a nucleus, um^2",
    "max_area": "largest area of a nucleus, um^2",
}


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "segment",
        parents=parents,
        help="find the nuclei of images",
        description="Find the nuclei of H&E images: the haematoxylin channel, a band-pass in the frequency domain, a "
        "threshold, and a watershed of the distance transform. Writes images.csv (count, density, area, eccentricity), "
        "nuclei.csv (one row a nucleus), segment.json (the settings) and overlays.",
        epilog=f"Exit code {SOME_FAILED}: done, but some files failed; they are listed.",
    )
    add = parser.add_argument
    add("input", metavar="INPUT", nargs="+", help="images, folders, patterns ('slides/*.png'), or @LIST")
    add("--out", metavar="FOLDER", required=True, help="folder to write to, made if missing")
    mpp = (
        f"micrometres a pixel, one number or Y,X; or '{BREAKHIS}': by the magnification in the name of a BreakHis image"
    )
    add("--mpp", metavar="UM", type=_mpp, required=True, help=mpp)
    add("--no-overlays", action="store_true", help="write no pictures")
    add("--json", action="store_true", help="print the figures of every image as JSON")
    method = parser.add_argument_group("method").add_argument
    for item in fields(NucleiSettings):
        method(
            f"--{item.name.replace('_', '-')}", type=float, metavar="X", default=item.default,
            help=f"{_MEANINGS[item.name]} (default: %(default)g)",
        )  # fmt: skip
    parser.set_defaults(run=run)


def _mpp(text: str) -> Any:
    if text == BREAKHIS:
        return text
    numbers = tuple(map(float, text.split(",")))
    return numbers[0] if len(numbers) == 1 else numbers


def run(arguments: argparse.Namespace) -> int:
    """Segment; returns 0, or 3 if a file failed."""
    settings = NucleiSettings(**{item.name: getattr(arguments, item.name) for item in fields(NucleiSettings)})
    done = segment_files(
        arguments.input, arguments.out, mpp=arguments.mpp, settings=settings, overlays=not arguments.no_overlays,
        reporter=Reporter(quiet=arguments.quiet),
    )  # fmt: skip
    failed = [entry for entry in done if entry.figures is None]
    if arguments.json:
        print_json([{"image": str(e.image), "reason": e.reason or None, **(e.figures or {})} for e in done])
    else:
        _print(done, failed, arguments.out)
    return SOME_FAILED if failed else 0


_LISTED = 20


def _print(done: list[FileNuclei], failed: list[FileNuclei], out: str) -> None:
    found = [entry for entry in done if entry.figures is not None]
    rows = []
    for entry in found[:_LISTED]:
        figures = entry.figures or {}
        numbers = [figures[name] for name in ("density_per_mm2", "area_mean_um2", "eccentricity_mean")]
        shown = ["-" if v is None else f"{v:.{d}f}" for v, d in zip(numbers, (0, 1, 2), strict=True)]
        rows.append([entry.image.name, str(figures["nuclei"]), *shown])
    if rows:
        print(format_table(["image", "nuclei", "per mm2", "area um2", "eccentricity"], rows))
    if len(found) > _LISTED:
        print(f"and {len(found) - _LISTED} more")
    for entry in failed:
        print(f"failed {entry.image}: {entry.reason}")
    print(f"\n{len(found)} images; written to {out}")
