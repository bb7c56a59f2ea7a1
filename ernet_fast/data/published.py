"""How many images the published BreakHis has."""

from __future__ import annotations

IMAGES: dict[str, dict[int, int]] = {
    "A": {40: 114, 100: 113, 200: 111, 400: 106},
    "F": {40: 253, 100: 260, 200: 264, 400: 237},
    "PT": {40: 109, 100: 121, 200: 108, 400: 115},
    "TA": {40: 149, 100: 150, 200: 140, 400: 130},
    "DC": {40: 864, 100: 903, 200: 896, 400: 788},
    "LC": {40: 156, 100: 170, 200: 163, 400: 137},
    "MC": {40: 205, 100: 222, 200: 196, 400: 169},
    "PC": {40: 145, 100: 142, 200: 135, 400: 138},
}
"""Images of each tumour type at each magnification, 7,909 in all: Spanhol et al., IEEE TBME 63(7), 2016, tables of the
data set's composition.
"""

SIZE = 460, 700
"""Height and width of an image in pixels."""
