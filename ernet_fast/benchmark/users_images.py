"""Images of the user's own, cut to the sizes that are measured."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ernet_fast.data.image_io import ImageReadError, read_pixels
from ernet_fast.data.layout import IMAGE_SUFFIXES, is_hidden

MOST_FILES = 1000  # that are read in search of one size
CROPS_OF_A_FILE = 8
TISSUE_LEVEL = 205  # of all channels: (I + 1) / 240 <= exp(-0.15)
LEAST_SHARE = 0.02  # of the pixels that are tissue


class UsersImages:
    """The image files in a folder and below it, PNG, JPEG or TIFF; those that cannot be read are left out.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.exists():
            raise FileNotFoundError(f"images={str(self.folder)!r}: no such folder.")
        if not self.folder.is_dir():
            raise NotADirectoryError(f"images={str(self.folder)!r} is a file; expected a folder of images.")
        found = (path for path in self.folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        self.files = sorted(
            path for path in found if not any(map(is_hidden, path.relative_to(self.folder).parts)) and path.is_file()
        )
        self.of_size = functools.lru_cache(maxsize=None)(self._of_size)

    def _of_size(self, height: int, width: int, most: int) -> list[NDArray[np.uint8]]:
        """Up to `most` crops [height, width, 3] uint8 that do not overlap and have tissue in them, from mixed files."""
        found: list[NDArray[np.uint8]] = []
        for number in np.random.default_rng(0).permutation(len(self.files))[:MOST_FILES]:
            for crop in self._crops(self.files[number], height, width):
                found.append(crop)
                if len(found) == most:
                    return found
        return found

    def _crops(self, path: Path, height: int, width: int) -> Iterator[NDArray[np.uint8]]:
        try:
            image = read_pixels(path)
        except ImageReadError:
            return
        tops, lefts = (
            range(0, have - size + 1, size) for have, size in zip(image.shape, (height, width), strict=False)
        )
        given = (image[y : y + height, x : x + width] for y in tops for x in lefts)
        wanted = (crop for crop in given if (crop.max(axis=2) <= TISSUE_LEVEL).mean() >= LEAST_SHARE)
        yield from map(np.ascontiguousarray, itertools.islice(wanted, CROPS_OF_A_FILE))

    def none_fits(self, size: tuple[int, int]) -> str:
        """Why there is nothing to measure."""
        height, width = size
        return (
            f"images={str(self.folder)!r}: none of {len(self.files)} PNG, JPEG and TIFF files can be read, has "
            f"{width} x {height} pixels and tissue on {100 * LEAST_SHARE:g} % of them. Give a folder of H&E images."
        )
