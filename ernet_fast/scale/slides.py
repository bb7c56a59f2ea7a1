"""Whole slides: stains of tissue tiles of the whole slide, and every tile normalised with them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from ernet_fast._version import __version__
from ernet_fast.data import ImageReadError
from ernet_fast.data.slide_reader import SlideReader, colour_of
from ernet_fast.scale import treat
from ernet_fast.scale.inputs import Job
from ernet_fast.scale.method import Method, Values
from ernet_fast.scale.pipeline import Work, commit, open_output
from ernet_fast.scale.slide_writer import COMPRESSIONS, Form, Tile, tiles_of, write_pyramid
from ernet_fast.scale.status import FileStatus
from ernet_fast.scale.zarr_file import SUFFIX as ZARR
from ernet_fast.stain.slide_fit import fit_tiles

FORMATS = ("tif", "svs", "ome.tif", "zarr.zip")


@dataclass(frozen=True)
class SlideForm:
    """Which part of a slide is written, and how.

    Attributes:
        level: of the slide, that becomes the first of the output.
        region: x, y, width and height of a part, in pixels of level 0; None for all.
        tile: width and height of the output's tiles, a multiple of 16.
        compression: "jpeg" (4:2:0) or "deflate" (without loss).
        quality: of JPEG, 1 to 100.
        format: of outputs in a folder: "tif", or "svs" (with a description as Aperio's scanners write it, by which
            readers find the objective's magnification, too), "ome.tif" (OME-TIFF, which says it in its XML) or
            "zarr.zip" (OME-Zarr, without loss). The name of a single output says it itself.
    """

    level: int = 0
    region: tuple[int, int, int, int] | None = None
    tile: int = 512
    compression: str = "jpeg"
    quality: int = 90
    format: str = "tif"

    def __post_init__(self) -> None:
        if self.level < 0:
            raise ValueError(f"level={self.level}; expected 0 for the full size, or the number of a smaller level.")
        if self.region is not None and (len(self.region) != 4 or min(self.region) < 0 or 0 in self.region[2:]):
            raise ValueError(f"region={self.region!r}; expected x, y, width and height in pixels of level 0.")
        if self.tile % 16 or not 16 <= self.tile <= 4096:
            raise ValueError(f"tile={self.tile}; expected a multiple of 16 from 16 to 4096.")
        if self.compression not in COMPRESSIONS:
            raise ValueError(f"compression={self.compression!r}; expected {' or '.join(map(repr, COMPRESSIONS))}.")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality!r}; expected a number from 1 to 100.")
        if self.format not in FORMATS:
            raise ValueError(f"format={self.format!r}; expected one of {', '.join(map(repr, FORMATS))}.")


def normalize_whole_slide(
    job: Job,
    form: SlideForm,
    work: Work,
    known: Values | None,
    begin: Callable[[int], None],
    advance: Callable[[], None],
) -> FileStatus:
    """Write one slide as a pyramid; `known` are its stains, None to fit them. Raises errors that end everything.

    `begin` is called with the number of tiles, `advance` after each.
    """
    try:
        reader = SlideReader(job.input)
    except ImageReadError as error:
        return treat.failed(job, error)
    try:
        slide = _Slide(reader, form, work.method)
        stains = known
        if stains is None:
            stains = work.method.fit_together(fit_tiles(reader, work.method.tissue))[0]
        status = slide.status(job, stains)
        if status.status == "error":
            return status
        begin(len([*tiles_of(*slide.size, form.tile)]))
        return _write(job, slide, stains, status, work.workers, advance)
    except ImageReadError as error:
        return treat.failed(job, error)
    finally:
        reader.close()


def _write(
    job: Job, slide: _Slide, stains: Values, status: FileStatus, workers: int, advance: Callable[[], None]
) -> FileStatus:
    try:
        pending = open_output(job)
    except OSError as error:
        return treat.unwritten(job, error)
    try:
        form = slide.written(job.output.name, workers)
        write_pyramid(pending.file, job.output.parent, slide.size, lambda tile: slide.tile(tile, stains), form, advance)
    except BaseException as error:
        pending.discard()
        if isinstance(error, OSError):
            return treat.unwritten(job, error)
        raise
    return commit(job, pending, "", replace(status, tissue_share=slide.tissue / (slide.size[0] * slide.size[1])))


class _Slide:
    """The part of a slide that is written, and what is known about it."""

    def __init__(self, reader: SlideReader, form: SlideForm, method: Method) -> None:
        self.reader, self.form, self.method = reader, form, method
        if form.level >= len(reader.levels):
            raise ImageReadError(f"level {form.level} is asked for, but the slide has {len(reader.levels)} levels")
        self.scale = reader.downsample(form.level)
        x, y, width, height = form.region or (0, 0, *reader.size)
        if x + width > reader.size[0] or y + height > reader.size[1]:
            raise ImageReadError(f"region {form.region} reaches beyond the slide's {reader.size[0]}x{reader.size[1]}")
        self.corner = round(x / self.scale), round(y / self.scale)
        level = reader.levels[form.level]
        whole = form.region is None
        part = max(1, round(width / self.scale)), max(1, round(height / self.scale))
        self.size: tuple[int, int] = (level[0], level[1]) if whole else part
        self.tissue, self._lock = 0.0, threading.Lock()

    def tile(self, tile: Tile, stains: Values) -> np.ndarray:
        """A normalised tile [h, w, 3]."""
        x, y, width, height = tile
        pixels = self.reader.read(self.corner[0] + x, self.corner[1] + y, width, height, self.form.level)
        alike = colour_of(pixels) is not None  # one pixel then says what becomes of all
        seen = np.ascontiguousarray(pixels[:1, :1]) if alike else pixels
        (result,), _, _ = self.method.normalize([torch.from_numpy(seen)], stains)
        with self._lock:
            self.tissue += self.method.tissue.share(seen) * width * height
        return np.broadcast_to(result.numpy(), pixels.shape)

    def status(self, job: Job, stains: Values) -> FileStatus:
        """What is to be said about the slide, before it is written."""
        seen = FileStatus(str(job.input), str(job.output), "ok", "", *self.size, stains=stains)
        if stains:
            return seen
        reason = "no stains can be fitted"
        if self.method.options.on_degenerate == "raise":
            return replace(seen, output=None, status="error", reason=reason)
        return replace(seen, status="degenerate", reason=reason)

    def written(self, name: str, workers: int) -> Form:
        """How the pyramid is written to a file of this name."""
        reader, form = self.reader, self.form
        mpp = None if reader.mpp is None else (reader.mpp[0] * self.scale, reader.mpp[1] * self.scale)
        objective = None if reader.objective is None else reader.objective / self.scale
        text, container = f"stain-normalised by ernet_fast {__version__}, {self.method.name}", "tiff"
        if name.lower().endswith(".svs"):
            text = f"Aperio format, {text}\r\n{self.size[0]}x{self.size[1]} ({form.tile}x{form.tile})"
            text += f"|AppMag = {objective:g}" if objective else ""
            text += f"|MPP = {mpp[0]:.6g}" if mpp else ""
        elif name.lower().endswith((".ome.tif", ".ome.tiff")):
            text, container = ome_xml(self.size, mpp, objective, text), "ome"
        elif name.lower().endswith(ZARR):
            container = "zarr"
        return Form(form.tile, form.compression, form.quality, mpp, text, workers, container)


def ome_xml(size: tuple[int, int], mpp: tuple[float, float] | None, objective: float | None, text: str) -> str:
    """The description of an RGB image in OME-TIFF (schema 2016-06; sizes of pixels are in micrometres there)."""
    pixel = "" if mpp is None else f' PhysicalSizeX="{mpp[0]:.9g}" PhysicalSizeY="{mpp[1]:.9g}"'
    lens = "" if objective is None else f'<Objective ID="Objective:0" NominalMagnification="{objective:g}"/>'
    used = '<InstrumentRef ID="Instrument:0"/><ObjectiveSettings ID="Objective:0"/>' if lens else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        + (f'<Instrument ID="Instrument:0">{lens}</Instrument>' if lens else "")
        + f'<Image ID="Image:0"><Description>{text}</Description>{used}<Pixels ID="Pixels:0" DimensionOrder="XYCZT" '
        f'Type="uint8" SizeX="{size[0]}" SizeY="{size[1]}" SizeC="3" SizeZ="1" SizeT="1" Interleaved="true"{pixel}>'
        '<Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData IFD="0" PlaneCount="1"/></Pixels></Image></OME>'
    )
