"""``ernet-fast normalize``: stain normalisation of files."""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from ernet_fast.cli.streams import print_json
from ernet_fast.console.progress import Reporter, Task
from ernet_fast.scale import Limits, SlideForm, Summary, merge_status, normalize_files, write_tables
from ernet_fast.scale.colour_table import POINTS
from ernet_fast.scale.encode import QUALITY
from ernet_fast.scale.files import FITS, FORMATS
from ernet_fast.scale.inputs import READABLE
from ernet_fast.scale.run import Progress
from ernet_fast.scale.slide_writer import COMPRESSIONS
from ernet_fast.scale.slides import FORMATS as SLIDE_FORMATS
from ernet_fast.scale.target import CONSTANTS, METHODS, PUBLISHED, saved_constants
from ernet_fast.stain.options import POLICIES, Options

SOME_FAILED = 3
"""Exit code of a run that came to its end, but could not do some of the files."""

_LISTED = 20
_OF_IMAGES = {
    "status": None, "preview": None, "shard": None, "format": "keep", "quality": None, "checksum": False,
    "verify": False, "device": "cpu",
}  # fmt: skip
"""Options that say how images are written, and what they are otherwise."""

_WORDS = {"ok": "normalised", "degenerate": "degenerate", "skipped": "skipped", "error": "failed"}
"""Statuses as this command prints them."""


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "normalize",
        parents=parents,
        help="normalise the stains of images",
        description=f"Give every image the stains of a target (Macenko et al., ISBI 2009, or Reinhard et al., 2001). "
        f"Reads {READABLE}; folders are searched with all their subfolders, whose structure is kept. Inputs are never "
        "overwritten. A run that was stopped goes on where it was when it is started again.",
        epilog=f"Exit code {SOME_FAILED}: done, but some files failed; they are listed.",
    )
    add = parser.add_argument
    inputs = "images, archives or folders of images, patterns ('slides/*/*.png'), or @LIST, a file of these, one a line"
    add("input", metavar="INPUT", nargs="+", help=inputs)
    add(
        "output", metavar="OUTPUT", help="folder for the normalised images, made if missing; for one image, also a file"
    )
    target = (
        "what all get to look like: an image, saved stains (.safetensors or .pt, the state dict of a normaliser) "
        "or 'published', the reference stains of Macenko's method (default)"
    )
    add("--target", metavar="FILE", default=PUBLISHED, help=target)
    status = "write a table with one row a file: status, reason, stains, share of tissue, checksum"
    add("--status", metavar="FILE", help=f"{status} (.csv, or .parquet with the extra parquet)")
    preview = "draw images before and after: those whose stains differ most from the others', and some typical ones"
    add("--preview", metavar="FILE.png", help=preview)
    overwrite = "replace outputs that exist (default: skip them, if they were made with the same settings)"
    add("--overwrite", action="store_true", help=overwrite)
    checksum = "look at the contents of inputs, not at size and time, to see which have changed since they were done"
    add("--checksum", action="store_true", help=checksum)
    verify = "write nothing; hold every output against the record of its run, and list what is missing or changed"
    add("--verify", action="store_true", help=verify)
    shard = "do what falls to machine I of N, or to that which SLURM_ARRAY_TASK_ID, RANK or SLURM_PROCID say (auto)"
    add("--shard", metavar="I/N", help=shard)
    merge = "merge tables of statuses: the inputs are tables, the output is one (nothing is normalised)"
    add("--merge", action="store_true", help=merge)
    kinds = "images; whole slides, as pyramids; or colour tables (.cube, .icc) of either for a viewer (default: images)"
    add("--as", choices=("images", "slides", "lut", "slide-lut"), default="images", dest="kind", help=kinds)
    add("--points", type=int, choices=POINTS, default=POINTS[0], help="grid points of a colour table (default: 33)")
    workers = "images processed, or with --device cuda read and written, at the same time (default: one a core)"
    add("--workers", type=int, metavar="N", help=workers)
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--json", action="store_true", help="print what became of every file as JSON")
    _add_files(parser)
    _add_slides(parser)
    _add_method(parser)
    parser.set_defaults(run=run)


def _add_files(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("files").add_argument
    base = "name outputs by the paths of inputs below this folder (default: the deepest that holds all inputs)"
    add("--base", metavar="FOLDER", help=base)
    formats = "file format: that of the input (default: keep), or one for all"
    add("--format", choices=FORMATS, default="keep", help=formats)
    quality = f"of JPEG and lossy WebP (default: as the input; {QUALITY} where it has none)"
    add("--quality", type=int, metavar="1-100", help=quality)
    limits = Limits()
    add(
        "--max-pixels", type=int, default=limits.pixels, metavar="N", help="refuse larger images (default: %(default)s)"
    )
    add("--max-bytes", type=int, default=limits.bytes, metavar="N", help="refuse larger files (default: %(default)s)")
    transparent = "pixels that are not opaque: refuse the image, compose it on white, or drop the alpha channel"
    add("--transparent", choices=("refuse", "white", "drop"), default="refuse", help=f"{transparent} (default: refuse)")


def _add_slides(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("whole slides, with --as slides").add_argument
    usual = SlideForm()
    add("--level", type=int, default=usual.level, metavar="N", help="level of the slide to write (default: 0)")
    region = "part of the slide to write, in pixels of level 0 (default: all)"
    add("--region", metavar="X,Y,WIDTH,HEIGHT", type=_region, help=region)
    add("--tile", type=int, default=usual.tile, metavar="N", help="size of tiles (default: %(default)s)")
    compression = "jpeg, or deflate without loss (default: jpeg)"
    add("--compression", choices=COMPRESSIONS, default=usual.compression, help=compression)
    kinds = "suffix of slides in a folder; svs keeps the magnification, too (default: tif)"
    add("--slide-format", choices=SLIDE_FORMATS, default=usual.format, help=kinds)


def _region(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _slides(arguments: argparse.Namespace) -> SlideForm | None:
    """How slides are written; None if there are none."""
    if arguments.kind != "slides":
        return None
    quality = SlideForm().quality if arguments.quality is None else arguments.quality
    given = arguments.level, arguments.region, arguments.tile, arguments.compression, quality, arguments.slide_format
    return SlideForm(*given)


def _add_method(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="macenko", help="default: macenko")
    fits = "the stains an image is taken to have: its own, of its folder's or slide's images together, or --source's"
    add("--fit", choices=FITS, default="per-image", help=f"{fits} (default: per-image)")
    pattern = (
        "with --fit per-slide: regular expression for the slide (its first group) in an image's path below the base"
    )
    add("--slide-pattern", metavar="REGEX", help=pattern)
    add("--source", metavar="FILE", help="with --fit fixed: the stains that all images have, given as --target")
    usual = Options()
    for option, meaning in (
        ("Io", "grey level of an empty slide"),
        ("alpha", "percentile of the extreme stain directions"),
        ("beta", "least optical density of tissue"),
    ):
        shown = f"{meaning} (default: that of a saved target, else {getattr(usual, option):g})"
        add(f"--{option}", type=float, metavar="X", help=shown)
    percentile = "linear as torchstain's NumPy backend, nearest as its torch backend (default: linear)"
    add("--percentile", choices=("linear", "nearest"), help=percentile)
    degenerate = (
        "an image without stains to fit (background): take it to be stained like the target, copy it, or count it as "
        "failed (default: reference)"
    )
    add("--on-degenerate", choices=POLICIES, help=degenerate)


def run(arguments: argparse.Namespace) -> int:
    """Normalise; returns 0, or 3 if a file failed."""
    if arguments.merge:
        count = merge_status(arguments.input, arguments.output)
        print(f"{count} files of {len(arguments.input)} tables; written to {arguments.output}")
        return 0
    if arguments.kind in ("lut", "slide-lut"):
        return _write_tables(arguments)
    with _Shown(Reporter(quiet=arguments.quiet)) as progress:
        quality = None if arguments.kind == "slides" else arguments.quality
        summary = normalize_files(
            arguments.input, arguments.output, target=arguments.target, method=arguments.method,
            options=_options(arguments), fit=arguments.fit, source=arguments.source,
            slide_pattern=arguments.slide_pattern, format=arguments.format, quality=quality, slides=_slides(arguments),
            base=arguments.base, overwrite=arguments.overwrite, checksum=arguments.checksum, verify=arguments.verify,
            shard=arguments.shard, status=arguments.status, preview=arguments.preview, workers=arguments.workers,
            device=arguments.device, progress=progress,
            limits=Limits(arguments.max_pixels, arguments.max_bytes, arguments.transparent),
        )  # fmt: skip
    if arguments.json:
        print_json(_as_json(summary))
    else:
        _print(summary, arguments.output, arguments.verify)
    return SOME_FAILED if summary.counts["error"] else 0


def _write_tables(arguments: argparse.Namespace) -> int:
    for name, usual in _OF_IMAGES.items():
        if getattr(arguments, name) != usual:
            raise ValueError(f"--{name} is for images; --as {arguments.kind} writes none.")
    with _Shown(Reporter(quiet=arguments.quiet)) as progress:
        tables = write_tables(
            arguments.input, arguments.output, target=arguments.target, method=arguments.method,
            options=_options(arguments), fit=arguments.fit, source=arguments.source,
            slide_pattern=arguments.slide_pattern, points=arguments.points, base=arguments.base,
            slides=arguments.kind == "slide-lut", overwrite=arguments.overwrite, progress=progress,
            limits=Limits(arguments.max_pixels, arguments.max_bytes, arguments.transparent),
        )  # fmt: skip
    if arguments.json:
        print_json([asdict(table) for table in tables])
    else:
        for table in tables:
            error = "" if table.mean is None else f"largest error {table.largest:.0f} levels, mean {table.mean:.2f}, "
            what = "slides" if arguments.kind == "slide-lut" else "images"
            over = f"over {table.colours} colours of {table.images} {what}" if error else ""
            print(f"{table.status:<10}  {table.name}: {error}{over}{'; ' * bool(error and table.reason)}{table.reason}")
        print(f"{sum(table.status != 'error' for table in tables)} tables; written to {arguments.output}")
    return SOME_FAILED if any(table.status == "error" for table in tables) else 0


def _options(arguments: argparse.Namespace) -> Options:
    """The constants given, over those of a saved target."""
    given = {name: getattr(arguments, name) for name in (*CONSTANTS, "on_degenerate")}
    saved = saved_constants(arguments.target) if arguments.method == "macenko" else None
    return replace(saved or Options(), **{name: value for name, value in given.items() if value is not None})


def _as_json(summary: Summary) -> dict[str, Any]:
    files = [{**asdict(file), "status": _WORDS[file.status]} for file in summary.files]
    counts = {_WORDS[name]: count for name, count in sorted(summary.counts.items())}
    return {"counts": counts, "done_before": len(summary.done_before), "files": files}


def _print(summary: Summary, output: str, verified: bool) -> None:
    for status, limit in (("error", len(summary.files)), ("degenerate", _LISTED), ("skipped", _LISTED)):
        found = [file for file in summary.files if file.status == status]
        for file in found[:limit]:
            print(f"{_WORDS[status]:<10}  {file.input}: {file.reason}")
        if len(found) > limit:
            print(f"... and {len(found) - limit} more {_WORDS[status]}; --json lists all")
    counts = Counter("before" if file.input in summary.done_before else file.status for file in summary.files)
    words = {"ok": "as recorded" if verified else "normalised", "before": "done before"}
    shown = ", ".join(f"{counts[status]} {word}" for status, word in {**_WORDS, **words}.items() if counts[status])
    written = any(counts[status] for status in ("ok", "degenerate", "before"))
    where = f"looked for in {output}" if verified else f"written to {output}" if written else "nothing written"
    print(f"{shown or 'nothing to do'}; {where}")


class _Shown(Progress, ExitStack):
    """Progress by a `Reporter`."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self._reporter, self._task = reporter, Task(lambda: None)

    def begin(self, title: str, total: int) -> None:
        """A bar or lines for the next part, in place of those of the part before."""
        self.close()
        self._task = self.enter_context(self._reporter.task(title, total))

    def warning(self, text: str) -> None:
        """A line, even when quiet."""
        self._reporter.warning(text)

    def advance(self) -> None:
        """One file more."""
        self._task.advance(1)
