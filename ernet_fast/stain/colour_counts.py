"""The stains of a slide of any size, tile by tile, exactly and in constant memory.

A Macenko fit looks at sums and order statistics over pixels, and pixels of one colour count alike. An 8-bit RGB image
has at most 2^24 colours, so how often each occurs is all that a fit has to know. Each tile is read once.
"""

from __future__ import annotations

from typing import Any

import torch

from ernet_fast import _backend
from ernet_fast.stain import operators
from ernet_fast.stain.collection import read_collection
from ernet_fast.stain.options import Options
from ernet_fast.stain.result import MacenkoFit
from ernet_fast.stain.tissue_mask import pixels_of_masks

COLOURS = 1 << 24


if _backend.extension_available():
    torch.library.register_fake("ernet::macenko_count_colours", lambda images, counts: None)
    torch.library.register_fake("ernet::macenko_fit_colours", lambda counts, *numbers: operators.fit_like(counts, 1))


class ColourCounts:
    """How often each 8-bit colour occurs in the tiles added so far.

    ``ColourCounts().add(tile_1).add(tile_2).fit()`` are the stains of the image made of both tiles, with the bits of
    `macenko_fit` of that image, whatever its size and however it is cut. Takes 128 MiB, and at most twice as much again
    while fitting.

    Attributes:
        counts: [2^24] int64 on the CPU, at red + 256 green + 65536 blue.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(COLOURS, dtype=torch.int64, device="cpu")

    @property
    def pixels(self) -> int:
        """Number of pixels added."""
        return int(self.counts.sum())

    def add(self, tiles: Any, *, layout: str | None = None, mask: Any = None) -> ColourCounts:
        """Count the pixels of one tile, a batch or a list of tiles; those that overlap count twice.

        Args:
            tiles: as `images` of `macenko_fit`, uint8.
            layout: as in `macenko_fit`.
            mask: as in `macenko_fit`; pixels outside are not counted.

        Raises:
            TypeError: another dtype than uint8.
            TypeError, ValueError: as in `macenko_fit`.
        """
        collection = read_collection(tiles, layout, "tiles")
        for part in collection.parts:
            if part.pixels.dtype != torch.uint8:
                raise TypeError(
                    f"tiles have dtype {str(part.pixels.dtype).removeprefix('torch.')}; colours are counted of uint8 "
                    "images only. Use macenko_fit for floating-point images."
                )
        images = [part.pixels for part in collection.parts] if mask is None else pixels_of_masks(collection, mask)
        for pixels in (image.cpu() for image in images if image.shape[3]):
            if _backend.extension_available():
                torch.ops.ernet.macenko_count_colours(operators.supported(pixels), self.counts)
            else:
                _backend.warn_fallback_once()
                red, green, blue = pixels.long().unbind(dim=1)
                self.counts += torch.bincount((red | green << 8 | blue << 16).flatten(), minlength=COLOURS)
        return self

    def merge(self, other: ColourCounts) -> ColourCounts:
        """Add what another process or thread counted."""
        self.counts += other.counts
        return self

    def fit(self, *, Io: float = 240, alpha: float = 1, beta: float = 0.15, percentile: str = "linear") -> MacenkoFit:
        """Stains of all tiles together, as `macenko_fit` of one image (B = 1), on the CPU."""
        o = Options(Io, alpha, beta, percentile)
        if _backend.extension_available():
            return MacenkoFit(*torch.ops.ernet.macenko_fit_colours(self.counts, o.Io, o.alpha, o.beta, o.nearest))
        from ernet_fast.reference.macenko import as_fit, fit_pixels

        colours = self.counts.nonzero()[:, 0]
        rgb = torch.stack([colours >> shift & 255 for shift in (0, 8, 16)], dim=1).double().numpy()
        weights = self.counts[colours].numpy()
        return as_fit([fit_pixels(rgb, weights, Io=Io, alpha=alpha, beta=beta, percentile=percentile)])

    def __repr__(self) -> str:
        """Numbers of pixels and colours."""
        return f"ColourCounts(pixels={self.pixels}, colours={int((self.counts > 0).sum())})"
