"""Colour tables in place of normalised images: of an image or whole slide, of a folder fitted together, or of all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ernet_fast.console.atomic_file import atomic_write, write_text
from ernet_fast.data import ImageReadError
from ernet_fast.data.slide_reader import SlideReader, reader_version
from ernet_fast.scale import treat
from ernet_fast.scale.colour_table import POINTS, ColourTable
from ernet_fast.scale.files import Stains, check_fit, known_stains
from ernet_fast.scale.folder_fit import Grouping, check_groups, grouping, groups, images_of
from ernet_fast.scale.inputs import Job, plan
from ernet_fast.scale.method import Method, Values
from ernet_fast.scale.pipeline import Work
from ernet_fast.scale.run import TOGETHER, Progress
from ernet_fast.scale.target import PUBLISHED, make_method
from ernet_fast.scale.treat import USUAL_LIMITS, Limits
from ernet_fast.stain.options import Options
from ernet_fast.stain.slide_fit import fit_tiles

SUFFIXES = (".cube", ".icc")


@dataclass(frozen=True)
class TableStatus:
    """What became of a table.

    Attributes:
        name: of the two files, without their suffixes.
        images: how many it stands for.
        status: "ok"; "degenerate": there are no stains to fit, and it does what `on_degenerate` says; or "error".
        reason: why it is not "ok".
        largest: the largest difference from the normalised image in grey levels, over the colours that occur.
        mean: the mean difference.
        colours: how many colours occur.
    """

    name: str
    images: int
    status: str
    reason: str = ""
    largest: float | None = None
    mean: float | None = None
    colours: int = 0


def write_tables(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    target: Stains = PUBLISHED,
    method: str = "macenko",
    options: Options | None = None,
    fit: str = "per-image",
    source: Stains | None = None,
    slide_pattern: str | None = None,
    points: int = 33,
    base: str | os.PathLike[str] | None = None,
    limits: Limits = USUAL_LIMITS,
    slides: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[TableStatus]:
    """Write the normalisation of each image, each folder or slide or all ("fixed") as NAME.cube and NAME.icc.

    Arguments as in `normalize_files`; `points` of each channel, 33 or 65. The tables of a folder lie beside it
    (slides/a/ gives a.cube), those of slides have their names, that of all is called all.cube. Existing tables are
    replaced only with `overwrite`.

    With `slides` the inputs are whole slides (extra "slides"), each with a table of its own, or all with one ("fixed").
    Stains, and the colours over which the error is taken, are those of the tiles that `normalize_slide` fits.

    Raises:
        FileExistsError: a table exists.
        FileNotFoundError, ImportError, ValueError: as `normalize_files`.
    """
    check_fit(fit, source)
    if slides:
        if fit == "per-folder":
            raise ValueError("fit='per-folder' is for images, not for whole slides.")
        fit = "per-image" if fit == "per-slide" else fit
        reader_version()
    group = grouping(fit, slide_pattern)
    if points not in POINTS:
        raise ValueError(f"points={points!r}; expected {' or '.join(map(str, POINTS))}.")
    chosen = make_method(target, method, options)
    known = None if source is None else known_stains(source, method, chosen.options)
    paths = [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs
    planned = plan(paths, output, base=base, slides=SUFFIXES[0] if slides else "")
    check_groups(planned.jobs, group)
    units = _units([job for job in planned.jobs if not job.is_archive], fit, group, planned.base.name)
    places = {name: Path(output) / name for name in units}
    existing = [place for place in places.values() if place.with_name(f"{place.name}.cube").exists()]
    if existing and not overwrite:
        raise FileExistsError(f"{existing[0]!s}.cube exists (one of {len(existing)}); --overwrite replaces them.")
    progress = progress or Progress()
    progress.begin("tables", sum(map(len, units.values())))
    tables = _Tables(Work(chosen, limits=limits), fit, known, points, slides, progress)
    return [tables.write(name, jobs, places[name]) for name, jobs in units.items()]


def _units(jobs: list[Job], fit: str, group: Grouping, base: str) -> dict[str, list[Job]]:
    """The images of every table, by its name."""
    if fit == "fixed":
        return {"all": jobs}
    if fit in TOGETHER:
        return {base if name == "." else name: own for name, own in groups(jobs, group).items()}
    return {os.path.splitext(job.name)[0]: [job] for job in jobs}


@dataclass
class _Tables:
    """How tables are made."""

    work: Work
    fit: str
    known: Values | None
    points: int
    slides: bool
    progress: Progress

    def write(self, name: str, jobs: list[Job], place: Path) -> TableStatus:
        """One table, over whose images two passes are made: one for the stains, one for the colours that occur."""
        method, occurring, failures = self.work.method, np.zeros(1 << 24, bool), 0
        reason = ""
        try:
            stains = self.stains(method, jobs)
            for job in jobs:
                try:
                    for pixels in self.pixels(job):
                        _mark(occurring, pixels)
                except (ImageReadError, OSError) as error:
                    failures, reason = failures + 1, treat.reason_of(error, job.input)
                self.progress.advance()
        except ImageReadError as error:
            return TableStatus(name, 0, "error", str(error))
        if failures == len(jobs):
            return TableStatus(name, 0, "error", reason)
        if not stains and method.options.on_degenerate == "raise":
            return TableStatus(name, len(jobs) - failures, "error", "no stains can be fitted")
        table = ColourTable(method, stains, self.points)
        off = table.error(_colours(occurring))
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place.with_name(f"{place.name}.cube"), table.cube(name))
        with atomic_write(place.with_name(f"{place.name}.icc")) as file:
            file.write(table.icc(f"{name}, stain-normalised"))
        status = "ok" if stains else "degenerate"
        said = [] if stains else ["no stains can be fitted"]
        what = "slides" if self.slides else "images"
        said += [f"{failures} of {len(jobs)} {what} cannot be read, e.g.: {reason}"] if failures else []
        return TableStatus(name, len(jobs) - failures, status, "; ".join(said), *off)

    def stains(self, method: Method, jobs: list[Job]) -> Values:
        """What the images are taken to be stained like; empty if that cannot be fitted."""
        if self.fit == "fixed":
            return self.known or ()
        if self.fit in TOGETHER:
            return method.fit_together(images_of(jobs, self.work))[0]
        if self.slides:
            return method.fit_together(self.pixels(jobs[0]))[0]
        try:
            picture = treat.open_picture(treat.load(jobs[0], self.work.limits), self.work.limits)
        except OSError as error:
            raise ImageReadError(treat.reason_of(error, jobs[0].input)) from error
        return treat.normalize(picture, method, None)[1]

    def pixels(self, job: Job) -> Iterator[np.ndarray]:
        """An image [H, W, 3], or the tiles of a whole slide that stains are fitted on."""
        if self.slides:
            with closing(SlideReader(job.input)) as reader:
                yield from fit_tiles(reader, self.work.method.tissue)
        else:
            yield treat.open_picture(treat.load(job, self.work.limits), self.work.limits).pixels


def _mark(occurring: np.ndarray, image: np.ndarray) -> None:
    """Note the colours of an image [H, W, 3] uint8 in [2^24] booleans."""
    for rows in np.array_split(image, max(1, image.size // (1 << 24))):
        red, green, blue = (rows[..., channel].astype(np.uint32) for channel in range(3))
        occurring[red << 16 | green << 8 | blue] = True


def _colours(occurring: np.ndarray) -> np.ndarray:
    """The colours [n, 3] uint8 that were noted."""
    found = np.flatnonzero(occurring)
    return np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1).astype(np.uint8)
