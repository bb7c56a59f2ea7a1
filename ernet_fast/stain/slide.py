"""Images too large for the memory: fitted and normalised strip by strip, as if in one call."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ernet_fast.stain import operators, pipeline
from ernet_fast.stain.colour_counts import ColourCounts
from ernet_fast.stain.layout import is_channels_last, read_images
from ernet_fast.stain.options import Options
from ernet_fast.stain.result import MacenkoFit, MacenkoStatus, check_fit, expand_fit

STRIP_PIXELS = 1 << 22
"""Pixels of a strip, if the caller does not say: the memory in use is a few times three bytes of each."""

CPU = torch.device("cpu")
Progress = Callable[[int, int], Any]


def macenko_normalize_slide(
    slide: Any,
    out: Any,
    target: MacenkoFit,
    source: MacenkoFit | None = None,
    *,
    Io: float = 240,
    alpha: float = 1,
    beta: float = 0.15,
    percentile: str = "linear",
    on_degenerate: str = "reference",
    layout: str | None = None,
    mask: Any = None,
    rows: int | None = None,
    progress: Progress | None = None,
) -> MacenkoFit:
    """`macenko_normalize` of one 8-bit image of any size, with the same bits, in constant memory.

    The image is read twice, strip by strip: once to count its colours (`ColourCounts`), from which its stains follow
    exactly, and once to be normalised; a given `source` saves the first time. Beside a strip this takes 128 MiB, and at
    most 256 MiB more between the two, whatever the size. The pages of shared memory maps (`numpy.memmap`,
    `numpy.load(..., mmap_mode="r")`) are given back to the system after each strip.

    Args:
        slide: uint8, [H, W, 3] or [3, H, W]: a memory map, or anything else with `shape` and `dtype` whose slices are
            arrays, such as an HDF5 or Zarr data set.
        out: where to write the result, of the same shape and dtype: anything whose slices can be assigned. It may be
            `slide` itself.
        target: the stains to give the image, of one image (B = 1).
        source: its own stains if they are known.
        Io: as in `macenko_fit`.
        alpha: as in `macenko_fit`.
        beta: as in `macenko_fit`.
        percentile: as in `macenko_fit`.
        on_degenerate: as in `macenko_normalize`; under "raise" nothing is written.
        layout: as in `macenko_fit`.
        mask: booleans [H, W], sliced as `slide` is: where to look for the source stains.
        rows: rows of a strip; a multiple of the rows of a chunk is best for chunked files. By default strips hold
            about four million pixels.
        progress: called with (rows done, rows to do) after each strip; both count every reading of a row.

    Returns:
        The stains of the image, B = 1, with their status.

    Raises:
        TypeError, ValueError: as in `macenko_normalize`, and for an `out` of another shape or dtype.
    """
    options = Options(Io, alpha, beta, percentile, on_degenerate, layout=layout)
    slide, out, mask = (array.numpy() if isinstance(array, torch.Tensor) else array for array in (slide, out, mask))
    row_axis, height, width = _read_shape(slide, layout)
    _check_like(out, "out", tuple(slide.shape), np.dtype(np.uint8))
    _check_writable(slide, out)
    target = pipeline.on_device(check_fit(target, 1, "target"), CPU)
    pipeline.check_target(target)
    if mask is not None:
        pipeline.check_no_mask(None if source is None else mask)
        _check_like(mask, "mask", (height, width), np.dtype(bool))
    rows = max(1, STRIP_PIXELS // width) if rows is None else rows
    if isinstance(rows, bool) or not isinstance(rows, (int, np.integer)) or rows < 1:
        raise ValueError(f"rows={rows!r}; expected a whole number of at least 1.")
    spans = [slice(begin, min(begin + int(rows), height)) for begin in range(0, height, int(rows))]
    before, done, work = (slice(None),) * row_axis, 0, (2 if source is None else 1) * height
    strip_layout = "CHW" if row_axis == 1 else "HWC"

    def strips() -> Iterator[tuple[slice, np.ndarray]]:
        nonlocal done
        for span in spans:
            yield span, np.asarray(slide[(*before, span)])
            done += span.stop - span.start
            if progress is not None:
                progress(done, work)

    if source is None:
        counts = ColourCounts()
        for span, strip in strips():
            counts.add(strip, layout=strip_layout, mask=None if mask is None else np.asarray(mask[span]))
            _let_go(slide, mask)
        source = counts.fit(Io=Io, alpha=alpha, beta=beta, percentile=percentile)
        del counts
    source = pipeline.on_device(expand_fit(source, 1, "source"), CPU)
    pipeline.check_source(source)
    pipeline.refuse_failures(source.status, on_degenerate)
    unchanged = options.identity and int(source.status[0]) != MacenkoStatus.OK
    wanted = expand_fit(target, 1, "target")
    usable = pipeline.usable_source(source, wanted)
    for span, strip in strips():
        if not unchanged:
            form = read_images(strip, strip_layout, "slide")
            strip = np.asarray(form.restore(operators.reconstruct(form.pixels, usable, wanted, options)))
        out[(*before, span)] = strip
        _let_go(slide, out)
    return source


def _read_shape(slide: Any, layout: str | None) -> tuple[int, int, int]:
    """Which axis the rows are, their number, and that of the columns."""
    if not (hasattr(slide, "shape") and hasattr(slide, "dtype")):
        raise TypeError(f"slide is a {type(slide).__name__}; expected a memory map or another array of one image.")
    if slide.dtype != np.uint8:
        raise TypeError(f"slide has dtype {slide.dtype}; expected uint8. macenko_normalize takes other images.")
    shape = tuple(slide.shape)
    if len(shape) != 3:
        raise ValueError(f"slide has shape {shape}; expected one image, [H, W, 3] or [3, H, W].")
    row_axis = 0 if is_channels_last(shape, layout, "slide") else 1
    if 0 in shape:
        raise ValueError(f"slide has shape {shape}: an image without pixels cannot be fitted.")
    return row_axis, shape[row_axis], shape[row_axis + 1]


def _check_like(array: Any, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        raise TypeError(f"{name} is a {type(array).__name__}; expected a memory map or another array.")
    if tuple(array.shape) != shape or array.dtype != dtype:
        raise ValueError(
            f"{name} has shape {tuple(array.shape)} and dtype {array.dtype}; the slide needs {shape} and {dtype}."
        )


def _check_writable(slide: Any, out: Any) -> None:
    if not (isinstance(slide, np.ndarray) and isinstance(out, np.ndarray)):
        return
    if not out.flags.writeable:
        raise ValueError('out is read-only; open a memory map with mode="r+" or "w+".')
    same = slide.ctypes.data == out.ctypes.data and slide.strides == out.strides
    if not same and np.may_share_memory(slide, out):
        raise ValueError(
            "out overlaps slide in memory without being slide; rows would be read after they were written."
        )


def _let_go(*arrays: Any) -> None:
    """Unmap the pages of shared memory maps. The system keeps their contents and reads them again where needed.

    Without this every page touched would count as memory of the process until the system runs short of it.
    """
    for array in arrays:
        # A private map (mode "c") would lose what was written to it.
        if isinstance(array, np.memmap) and array.mode in ("r", "r+", "w+") and hasattr(mmap, "MADV_DONTNEED"):
            base: Any = array
            while isinstance(base, np.ndarray):
                base = base.base
            if isinstance(base, mmap.mmap):
                base.madvise(mmap.MADV_DONTNEED)
