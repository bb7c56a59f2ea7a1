"""How large a pixel of a BreakHis image is taken to be."""

from __future__ import annotations

BREAKHIS_HEIGHT = 460
"""Pixels of an image's height, as published."""

MICROMETRES_AT_1X = 0.33 * 200
"""At 200X an epithelial nucleus of 8 um is about 24 pixels wide, which makes 0.33 um a pixel; in proportion elsewhere.

An estimate: the images carry no scale, and the sizes in the data set's description (0.10 um at 200X) would make these
nuclei 2.4 um wide.
"""


def breakhis_mpp(magnification: int, height: int = BREAKHIS_HEIGHT) -> float:
    """Micrometres a pixel of a BreakHis image of `magnification` whose 460 rows were resized to `height`.

    Raises:
        ValueError: a number is not positive.
    """
    if magnification <= 0 or height <= 0:
        raise ValueError(f"magnification={magnification}, height={height}; expected positive numbers")
    return MICROMETRES_AT_1X / magnification * BREAKHIS_HEIGHT / height
