"""Nuclei of image files: tables and overlays in a folder."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ernet_fast._optional import require
from ernet_fast._version import __version__
from ernet_fast.console.atomic_file import atomic_write, remove_abandoned, write_csv, write_json
from ernet_fast.console.progress import Reporter
from ernet_fast.data import ImageReadError, parse_name, read_image
from ernet_fast.data.pixel_size import breakhis_mpp
from ernet_fast.scale.inputs import image_files
from ernet_fast.segment.nuclei import SegmentedNuclei, nuclei, pixel_size
from ernet_fast.segment.overlay import draw_outlines
from ernet_fast.segment.settings import NucleiSettings

BREAKHIS = "breakhis"
"""As `mpp`: the size that `breakhis_mpp` gives the magnification in a file's name."""

_NUCLEUS = (
    "image", "nucleus", "y", "x", "area_um2", "eccentricity", "major_axis_um", "minor_axis_um", "haematoxylin",
    "at_border",
)  # fmt: skip


@dataclass(frozen=True)
class FileNuclei:
    """What was found in one file: plain figures, or None and the reason why there are none."""

    image: Path
    figures: dict[str, Any] | None
    reason: str = ""


def segment_files(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    mpp: float | tuple[float, float] | str,
    settings: NucleiSettings | None = None,
    overlays: bool = True,
    reporter: Reporter | None = None,
) -> list[FileNuclei]:
    """Find the nuclei of every image and write `images.csv`, `nuclei.csv`, `segment.json` and `overlays/` into `out`.

    One image is in memory at a time; a file that cannot be read stops no other.

    Args:
        inputs: images, folders, patterns and lists of them.
        out: folder to write to, made if missing; files of an earlier call are replaced.
        mpp: micrometres a pixel, one number or (along y, along x), or "breakhis": `breakhis_mpp` of the
            magnification in the name and the image's height, pixels taken to be square.
        settings: what counts as a nucleus.
        overlays: write a picture of each image with the outlines.
        reporter: where progress goes; default: stderr.

    Returns:
        One entry a file, in the order of their paths; what looks like an image and is not read comes last.

    Raises:
        FileNotFoundError, ValueError: an input is missing, there is no image, or an argument does not fit.
        ImportError: the extra "segment" is not installed.
    """
    given = None if mpp == BREAKHIS else pixel_size(mpp)  # type: ignore[arg-type]
    settings, reporter, folder = settings or NucleiSettings(), reporter or Reporter(), Path(out)
    require("skimage.segmentation", extra="segment", purpose="segmenting nuclei")
    paths, left_out = image_files(inputs)
    base = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    done = []
    with _table(folder / "nuclei.csv", _NUCLEUS) as write, reporter.task("segment", len(paths)) as task:
        for path in paths:
            name = path.absolute().relative_to(base)
            try:
                found = _segment(path, given, settings, folder / "overlays" / f"{name}.png" if overlays else None)
            except (ImageReadError, FileNotFoundError, ValueError) as error:
                done.append(FileNuclei(path, None, str(error)))
            else:
                write(_rows(name.as_posix(), found))
                done.append(FileNuclei(path, {"mpp_y": found.mpp[0], "mpp_x": found.mpp[1], **found.figures()}))
            task.advance(1)
    done += [FileNuclei(path, None, reason) for path, reason in left_out]
    _write_images(folder, done)
    shown = list(given) if given else BREAKHIS
    write_json(folder / "segment.json", {"version": __version__, "mpp": shown, "settings": asdict(settings)})
    return done


def _segment(
    path: Path, mpp: tuple[float, float] | None, settings: NucleiSettings, overlay: Path | None
) -> SegmentedNuclei:
    image = read_image(path)
    if mpp is None:
        side = breakhis_mpp(parse_name(path).magnification, image.shape[1])
        mpp = side, side
    found = nuclei(image, mpp=mpp, settings=settings, layout="CHW")
    if overlay is not None:
        pil = require("PIL.Image", extra="train", purpose="writing pictures")
        overlay.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(overlay) as file:
            pil.fromarray(draw_outlines(image, found)).save(file, format="PNG")
    return found


def _rows(name: str, found: SegmentedNuclei) -> Iterator[list[Any]]:
    regions = found.regions
    for k in range(found.count):
        numbers = (*regions.position[k], regions.area[k], regions.eccentricity[k], *regions.axes[k])
        yield [name, k + 1, *(f"{v:.4g}" for v in (*numbers, regions.haematoxylin[k])), int(regions.at_border[k])]


@contextmanager
def _table(path: Path, header: Sequence[str]) -> Iterator[Any]:
    """A CSV file that is written piece by piece, and appears when the block ends."""
    with atomic_write(path) as file:
        text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        yield writer.writerows
        text.flush()
        text.detach()


def _write_images(folder: Path, done: list[FileNuclei]) -> None:
    names = next((list(entry.figures) for entry in done if entry.figures is not None), [])
    rows: list[list[Any]] = [["image", *names, "reason"]]
    for entry in done:
        figures = entry.figures or {}
        values = [figures.get(name) for name in names]
        shown = ["" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in values]
        rows.append([str(entry.image), *shown, entry.reason])
    write_csv(folder / "images.csv", rows)
