"""`SlideTiles`: the tiles of slides as a data set, with the stains of their slides."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from ernet_fast._optional import require
from ernet_fast.data.slide_reader import SlideReader
from ernet_fast.stain.joined_fit import macenko_fit_together, reinhard_fit_together
from ernet_fast.stain.normalizer import MacenkoNormalizer
from ernet_fast.stain.reinhard import ReinhardFit, ReinhardNormalizer
from ernet_fast.stain.result import MacenkoFit
from ernet_fast.stain.slide_fit import fit_tiles
from ernet_fast.stain.slide_grid import Grid, GridForm, grid_of
from ernet_fast.stain.tissue import Tissue

STAINS = ("slide", "tile")
OPEN_SLIDES = 8
"""Slides that a process keeps open at a time."""

Slide = str | os.PathLike[str]
Normalizer = MacenkoNormalizer | ReinhardNormalizer
Fit = MacenkoFit | ReinhardFit


class SlideTile(NamedTuple):
    """A tile, which torch's `default_collate` makes batches of.

    Attributes:
        image: [3, size, size], as the normaliser gives it; uint8 without one; or what `transform` makes of that.
        slide: number of the slide in `SlideTiles.slides`.
        x: of its upper left corner, in pixels of level 0.
        y: the same.
    """

    image: Any
    slide: int
    x: int
    y: int


class SlideTiles(Dataset[SlideTile]):
    """The tiles of slides on a grid, at one resolution, those with tissue only, stain-normalised as they are read.

    A map-style data set: ``DataLoader(SlideTiles(["a.svs", "b.svs"], normalizer, mpp=0.5), batch_size=64,
    num_workers=8)``. With ``stains="slide"`` each tile is what it is alone with the stains of its slide: those that
    `ernet_fast.scale.normalize_slide` fits and writes.

    Workers, whether forked or spawned, open slides of their own, at most `OPEN_SLIDES` at a time. Tiles are in the
    order of the slides, row by row. Everything is computed on the CPU. To normalise on a GPU, normalise batches in the
    process that holds it:
    ``normalizer.cuda()(batch.image.cuda(), tiles.sources(batch.slide))`` with batches of ``tiles.unnormalized()``.

    Args:
        slides: files that OpenSlide reads (or tifffile, where it is missing); extra "slides".
        normalizer: a fitted normaliser on the CPU; None for the tiles as they are.
        size: width and height of tiles in pixels of the wanted resolution.
        mpp: the resolution wanted, in micrometres a pixel: tiles are read from the level that is next finer and scaled
            down (bilinear, antialiased), or as they are where a level is within 2 % of it. None for level 0.
        overlap: pixels that a tile shares with the next; the grid begins at (0, 0), and tiles that do not lie wholly in
            the slide are left out.
        tissue: the least share of tissue of a tile, looked for in the slide's smallest level; 0 for all tiles.
            Tissue is what the normaliser's `Io` and `beta` say (240 and 0.15 without one).
        stains: "slide": fitted on tiles with tissue of the whole slide; "tile": of each tile alone.
        sources: stains that slides are known to have, one fit (B = 1) each or None; the others are fitted here.
        places: x and y of the tiles of each slide, [tiles, 2] in pixels of level 0, in place of the grid: those that
            another program found.
        slide_mpp: micrometres a pixel of level 0 of slides that do not say it.
        transform: called with each image, where it is read.
        progress: called with (slides done, slides) while the slides are looked through.

    Attributes:
        slides: the files.
        form: size, mpp, overlap, tissue and slide_mpp.
        fits: stains of each slide, B = 1; None without a normaliser or with "tile".

    Raises:
        ImportError: the extra "slides" is missing.
        ernet_fast.data.ImageReadError: a slide cannot be read.
        TypeError, ValueError: arguments that make no sense, a slide without a resolution, or coarser than `mpp`.
    """

    def __init__(
        self,
        slides: Slide | Sequence[Slide],
        normalizer: Normalizer | None = None,
        *,
        size: int = 256,
        mpp: float | None = 0.5,
        overlap: int = 0,
        tissue: float = 0.25,
        stains: str = "slide",
        sources: Sequence[Fit | None] | None = None,
        places: Sequence[Any] | None = None,
        slide_mpp: float | None = None,
        transform: Callable[[Any], Any] | None = None,
        progress: Callable[[int, int], Any] | None = None,
    ) -> None:
        self.slides = [Path(slides)] if isinstance(slides, (str, os.PathLike)) else [Path(slide) for slide in slides]
        _check(normalizer, stains)
        self.form = GridForm(size, mpp, overlap, tissue, slide_mpp)
        for name, given in (("sources", sources), ("places", places)):
            if given is not None and len(given) != len(self.slides):
                raise ValueError(f"{name} holds {len(given)} entries for {len(self.slides)} slides; expected one each.")
        if sources is not None and stains == "tile":
            raise ValueError("stains='tile' fits each tile alone; sources are of slides. Pass one of the two.")
        self.normalizer, self.stains, self.transform = normalizer, stains, transform
        self._definition = Tissue(*_constants(normalizer))
        self._open: OrderedDict[int, SlideReader] = OrderedDict()
        self._owner = os.getpid()
        self.fits: list[Fit | None] = []
        self._grids: list[Grid] = []
        for number in range(len(self.slides)):
            reader = self._reader(number)
            own = None if places is None else places[number]
            self._grids.append(grid_of(reader, self.form, self._definition, own))
            known = None if sources is None else sources[number]
            self.fits.append(self._fit(reader) if known is None else known)
            if progress is not None:
                progress(number + 1, len(self.slides))
        self._ends = np.cumsum([len(grid.places) for grid in self._grids])

    def __len__(self) -> int:
        """Number of tiles of all slides."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> SlideTile:
        """One tile.

        Raises:
            ernet_fast.data.ImageReadError: the tile is damaged; the message says where.
            RuntimeError: the normaliser was moved to a GPU.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"tile {index} of {len(self)}")
        number, x, y = self.place(index)
        image = self._normalized(self.raw(number, x, y), number)
        return SlideTile(image if self.transform is None else self.transform(image), number, x, y)

    def place(self, index: int) -> tuple[int, int, int]:
        """The slide's number, x and y of a tile, without reading it."""
        index %= len(self)
        number = int(np.searchsorted(self._ends, index, side="right"))
        grid = self._grids[number]
        x, y = grid.places[index - int(self._ends[number]) + len(grid.places)].tolist()
        return number, x, y

    def coordinates(self, slide: int) -> np.ndarray:
        """[tiles, 2] int64: x and y of all tiles of a slide, in pixels of level 0."""
        return self._grids[slide].places.copy()

    def tiles_of(self, slide: int) -> range:
        """The indices of all tiles of a slide, as for `torch.utils.data.Subset`."""
        end = int(self._ends[slide])
        return range(end - len(self._grids[slide].places), end)

    def patch_size(self, slide: int) -> tuple[int, int]:
        """Width and height of the slide's tiles in pixels of level 0."""
        width, height = self._grids[slide].extent
        return round(width), round(height)

    def raw(self, slide: int, x: int, y: int) -> np.ndarray:
        """A tile as it is [size, size, 3] uint8."""
        grid = self._grids[slide]
        pixels = self._reader(slide).read_at(x, y, *grid.read, grid.level)
        size = self.form.size
        if grid.read == (size, size):
            return pixels
        pil = require("PIL.Image", extra="slides", purpose="scaling tiles")
        return np.asarray(pil.fromarray(pixels).resize((size, size), pil.Resampling.BILINEAR))

    def sources(self, slides: Any) -> Any:
        """The stains of these slides as one fit of a batch, as `source` of a normaliser.

        Args:
            slides: numbers of slides, such as `SlideTile.slide` of a batch.

        Raises:
            ValueError: stains were not fitted: there is no normaliser, or `stains` is "tile".
        """
        fits = [fit for number in slides if (fit := self.fits[int(number)]) is not None]
        if not fits or len(fits) != len(slides):
            raise ValueError("no stains are known: give a normaliser, and stains='slide'.")
        return type(fits[0])(*map(torch.cat, zip(*fits, strict=True)))

    def unnormalized(self) -> SlideTiles:
        """The same tiles as they are in the slides, with the stains that were fitted (`sources`)."""
        tiles = copy.copy(self)
        tiles._open, tiles.normalizer = OrderedDict(), None
        return tiles

    def _normalized(self, pixels: np.ndarray, number: int) -> torch.Tensor:
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        if self.normalizer is None:
            return image
        if any(buffer.device.type != "cpu" for buffer in self.normalizer.buffers()):
            where = " in a worker process" if get_worker_info() is not None else ""
            raise RuntimeError(
                f"the normaliser{where} is on a GPU; tiles are normalised on the CPU. Give SlideTiles a normaliser "
                "of its own (copy.deepcopy(normalizer).cpu()), or take tiles.unnormalized(), and normalise batches in "
                "the process that holds the GPU."
            )
        return self.normalizer(image[None], self.fits[number])[0]

    def _fit(self, reader: SlideReader) -> Fit | None:
        """The stains of a slide."""
        if self.normalizer is None or self.stains == "tile":
            return None
        tiles = fit_tiles(reader, self._definition)
        if isinstance(self.normalizer, ReinhardNormalizer):
            return reinhard_fit_together(tiles)
        return macenko_fit_together(tiles, replace(self.normalizer.options, range=255))

    def _reader(self, number: int) -> SlideReader:
        """An open slide of this process: after a fork, those of the parent share their files' positions."""
        if self._owner != os.getpid():
            self._open, self._owner = OrderedDict(), os.getpid()
        reader = self._open.pop(number, None) or SlideReader(self.slides[number])
        self._open[number] = reader
        while len(self._open) > OPEN_SLIDES:
            self._open.popitem(last=False)[1].close()
        return reader

    def __getstate__(self) -> dict[str, Any]:
        """Without open slides, for spawned workers."""
        return {**self.__dict__, "_open": OrderedDict(), "_owner": -1}

    def __repr__(self) -> str:
        """Slides, tiles and the resolution."""
        size = self.form.size
        return f"SlideTiles({len(self.slides)} slides, {len(self)} tiles of {size}x{size}, mpp={self.form.mpp})"


def _check(normalizer: Any, stains: str) -> None:
    """Raise TypeError or ValueError for arguments that make no sense."""
    if normalizer is not None and not isinstance(normalizer, (MacenkoNormalizer, ReinhardNormalizer)):
        raise TypeError(
            f"normalizer is a {type(normalizer).__name__}; expected a MacenkoNormalizer, a ReinhardNormalizer or None."
        )
    if normalizer is not None and normalizer.layout == "HWC":
        raise ValueError("the normaliser has layout='HWC', but tiles are [3, size, size]; leave its layout out.")
    if stains not in STAINS:
        raise ValueError(f"stains={stains!r}; expected {' or '.join(map(repr, STAINS))}.")


def _constants(normalizer: Normalizer | None) -> tuple[float, float]:
    """Io and beta of tissue."""
    return (normalizer.Io, normalizer.beta) if isinstance(normalizer, MacenkoNormalizer) else (240, 0.15)
