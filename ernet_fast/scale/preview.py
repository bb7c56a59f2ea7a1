"""A contact sheet of a run: images before and after, those whose stains differ most from the others' first."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ernet_fast._optional import require
from ernet_fast.console.atomic_file import atomic_write
from ernet_fast.data import ImageReadError
from ernet_fast.data.image_io import decode, read_file
from ernet_fast.data.slide_reader import SlideReader
from ernet_fast.scale.containers import ArchiveError, open_archive, reading
from ernet_fast.scale.status import FileStatus, Summary
from ernet_fast.stain.slide_fit import thumbnail
from ernet_fast.stain.tissue import Tissue

SUFFIXES = (".png", ".jpg", ".jpeg")
TYPICAL, OUTLIERS = 12, 12
"""Pairs shown of each kind."""

_COLUMNS, _THUMBNAIL, _GAP, _LINE = 4, 150, 8, 14
_OUTLINE = (0, 160, 0)  # colour of the outline of tissue
_PURPOSE = {"extra": "train", "purpose": "drawing a preview"}


@dataclass(frozen=True)
class Deviation:
    """How far the stains of an image are from the median of all: in degrees, or for Reinhard in units of Lab."""

    file: FileStatus
    value: float
    shown: str


def check_preview_path(path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless `path` names a picture that is written."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"the preview is {str(path)!r}; expected a name that ends in {', '.join(SUFFIXES)}.")


def deviations(summary: Summary) -> list[Deviation]:
    """All images with stains of their own, the farthest from the median stains first.

    Macenko: the larger of the angles between the stain vectors of the image and the medians of all images. Reinhard:
    the distance of the mean colours.
    """
    files = [file for file in summary.files if file.stains and file.output is not None]
    if not files:
        return []
    values = np.array([file.stains for file in files])
    if summary.columns[0].startswith("haematoxylin"):
        degrees = [_angles(values[:, part]) for part in (slice(0, 3), slice(3, 6))]
        found = np.maximum(*degrees)
        shown = [f"haematoxylin {h:.1f}°, eosin {e:.1f}°" for h, e in zip(*degrees, strict=True)]
    else:
        found = np.linalg.norm(values[:, :3] - np.median(values[:, :3], axis=0), axis=1)
        shown = [f"mean colour {value:.1f} from the median" for value in found]
    order = np.argsort(-found, kind="stable")
    return [Deviation(files[i], float(found[i]), shown[i]) for i in order]


def _angles(vectors: np.ndarray) -> np.ndarray:
    """Degrees between vectors [n, 3] and their median."""
    middle = np.median(vectors, axis=0)
    cosines = vectors @ middle / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(middle))
    return np.degrees(np.arccos(np.clip(cosines, -1, 1)))


def chosen(summary: Summary) -> dict[str, list[Deviation]]:
    """What is shown: the farthest, and of the others some that are evenly spaced in their distance."""
    ordered = deviations(summary)
    outliers, others = ordered[:OUTLIERS], ordered[OUTLIERS:]
    places = np.linspace(0, len(others) - 1, min(TYPICAL, len(others))).round().astype(int)
    return {
        "The stains that differ most from the median of all": outliers,
        "Others, from those that differ more to those that differ less": [others[i] for i in places],
    }


def write_preview(path: str | os.PathLike[str], summary: Summary, slides: Tissue | None = None) -> None:
    """Draw the contact sheet of a run into a PNG or JPEG file: pairs of before (left) and after (right).

    Images are read again from inputs and outputs, in archives too; one that cannot be read stays grey.

    Args:
        path: where to.
        summary: of the run.
        slides: whole slides were normalised, and the outline of this tissue is drawn into those before.

    Raises:
        ValueError: another suffix.
        ImportError: Pillow is missing.
    """
    check_preview_path(path)
    sections = {title: found for title, found in chosen(summary).items() if found}
    names = {name for found in sections.values() for one in found for name in (one.file.input, one.file.output or "")}
    small = thumbnails(names)
    if slides is not None:
        before = {one.file.input for found in sections.values() for one in found}
        small |= _of_slides({name: slides if name in before else None for name in names - small.keys()})
    sheet = _draw(summary, sections, small)
    with atomic_write(path) as file:
        sheet.save(file, format="PNG" if Path(path).suffix.lower() == ".png" else "JPEG")


def thumbnails(names: Iterable[str]) -> dict[str, Any]:
    """Small Pillow images of files, and of members of archives ("shard.tar::name"); those that cannot be read are
    missing.
    """
    found: dict[str, Any] = {}
    in_archives: dict[str, set[str]] = {}
    for name in names:
        archive, inside, member = name.partition("::")
        if inside and not os.path.exists(name):
            in_archives.setdefault(archive, set()).add(member)
        else:
            with contextlib.suppress(ImageReadError, OSError):
                found[name] = _thumbnail(read_file(Path(name)))
    for archive, wanted in in_archives.items():
        with contextlib.suppress(ArchiveError), reading(), open(archive, "rb") as file:
            source = open_archive(file, archive, "r")
            for one in source.members():
                if one.name in wanted:
                    with contextlib.suppress(ImageReadError):
                        found[f"{archive}::{one.name}"] = _thumbnail(source.open(one).read())
    return found


def _of_slides(names: dict[str, Tissue | None]) -> dict[str, Any]:
    """Small Pillow images of slides, those with a tissue with its outline; slides that cannot be read are missing."""
    found = {}
    for name, tissue in names.items():
        with contextlib.suppress(ImageReadError):
            reader = SlideReader(Path(name))
            try:
                pixels = thumbnail(reader, _THUMBNAIL)
            finally:
                reader.close()
            if tissue is not None:
                pixels[_outline(tissue.mask(pixels))] = _OUTLINE
            found[name] = require("PIL.Image", **_PURPOSE).fromarray(pixels)
    return found


def _outline(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask [h, w] that have a neighbour outside of it."""
    inner = np.pad(mask, 1, mode="edge")
    return mask & ~(inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:])


def _thumbnail(data: bytes) -> Any:
    image = require("PIL.Image", **_PURPOSE).fromarray(decode(data, transparent="drop")[0])
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return image


def _draw(summary: Summary, sections: dict[str, list[Deviation]], small: dict[str, Any]) -> Any:
    pil, drawing = require("PIL.Image", **_PURPOSE), require("PIL.ImageDraw", **_PURPOSE)
    cell = (2 * _THUMBNAIL + _GAP + 2, _THUMBNAIL + 3 * _LINE + _GAP)
    rows = {title: -(-len(found) // _COLUMNS) for title, found in sections.items()}
    height = 3 * _LINE + sum(2 * _LINE + count * cell[1] for count in rows.values())
    sheet = pil.new("RGB", (_COLUMNS * cell[0] + _GAP, height + _GAP), "white")
    draw = drawing.Draw(sheet)
    counts = ", ".join(f"{count} {status}" for status, count in sorted(summary.counts.items()))
    draw.text((_GAP, _GAP), f"{len(summary.files)} files: {counts}. Before, left; after, right.", "black")
    top = 3 * _LINE
    for title, found in sections.items():
        draw.text((_GAP, top), title, "black")
        top += 2 * _LINE
        for number, one in enumerate(found):
            left = _GAP + number % _COLUMNS * cell[0]
            _draw_pair(sheet, draw, (left, top + number // _COLUMNS * cell[1]), one, small)
        top += rows[title] * cell[1]
    return sheet


def _draw_pair(sheet: Any, draw: Any, place: tuple[int, int], one: Deviation, small: dict[str, Any]) -> None:
    left, top = place
    for number, name in enumerate((one.file.input, one.file.output or "")):
        corner = (left + number * (_THUMBNAIL + 2), top)
        if name in small:
            sheet.paste(small[name], corner)
        else:
            draw.rectangle((*corner, corner[0] + _THUMBNAIL, top + _THUMBNAIL), "lightgrey")
    for line, text in enumerate(_caption(one)):
        draw.text((left, top + _THUMBNAIL + 2 + line * _LINE), text, "black")


def _caption(one: Deviation) -> Sequence[str]:
    name = one.file.input if len(one.file.input) <= 46 else f"...{one.file.input[-43:]}"
    plain = name.encode("latin-1", "replace").decode("latin-1")  # what Pillow's own font can draw
    return plain, one.shown
