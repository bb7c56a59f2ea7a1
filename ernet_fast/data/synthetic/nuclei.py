"""Nuclei: ellipses with an irregular outline and textured chromatin, painted many at a time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ernet_fast.data.synthetic.texture import Image, smooth_noise

_MAX_CELLS = 400_000  # window pixels painted at once: bounds memory


class Nuclei(NamedTuple):
    """n nuclei."""

    position: NDArray[np.float64]  # [n, 2]: y, x in pixels
    axes: NDArray[np.float64]  # [n, 2]: half axes in pixels
    angle: NDArray[np.float64]  # [n], of the long axis
    chromatin: NDArray[np.float64]  # [n]: haematoxylin concentration
    irregularity: NDArray[np.float64]  # [n], of the outline: share of the radius
    nucleolus: NDArray[np.float64]  # [n]: extra concentration

    def take(self, which: NDArray[np.bool_] | NDArray[np.intp]) -> Nuclei:
        """The nuclei that an index or a mask selects."""
        return Nuclei(*(field[which] for field in self))


def paint_nuclei(rng: np.random.Generator, nuclei: Nuclei, shape: tuple[int, int]) -> tuple[Image, Image]:
    """Return (cover, haematoxylin) [H, W]: how much of a pixel is nucleus (0 ... 1), and its concentration there.

    Where nuclei overlap, the larger value counts, as for cells that lie in one plane of a thin section.
    """
    cover, haematoxylin = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    if not len(nuclei.angle):
        return cover, haematoxylin
    radius = float(np.median(nuclei.axes))
    shift_y, shift_x = (smooth_noise(rng, shape, 0.9 * radius).ravel() for _ in range(2))
    chromatin = 1 + 0.16 * smooth_noise(rng, shape, 0.30 * radius) + 0.12 * smooth_noise(rng, shape, 0.7 * radius)
    chromatin = np.clip(chromatin, 0.5, 1.7).ravel()
    reach = np.ceil(1.35 * nuclei.axes.max(axis=1) + 1.5).astype(int)
    order = np.argsort(reach, kind="stable")
    while len(order):  # nuclei of about one size share a window size
        limit = int(reach[order[0]] * 1.3) + 1
        most = max(1, _MAX_CELLS // (2 * limit + 1) ** 2)
        end = min(most, int(np.searchsorted(reach[order], limit, side="right")))
        half = int(reach[order[end - 1]])
        _paint(nuclei.take(order[:end]), half, (shift_y, shift_x, chromatin), cover, haematoxylin)
        order = order[end:]
    return cover, haematoxylin


def _paint(nuclei: Nuclei, half: int, fields: tuple[Image, Image, Image], cover: Image, haematoxylin: Image) -> None:
    height, width = cover.shape
    shift_y, shift_x, chromatin = fields
    offset = np.arange(-half, half + 1)
    centre = np.round(nuclei.position).astype(int)
    rows = (centre[:, 0, None] + offset)[:, :, None]
    columns = (centre[:, 1, None] + offset)[:, None, :]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    which, _, _ = np.nonzero(inside)
    index = (rows * width + columns)[inside]
    rows_in, columns_in = np.broadcast_to(rows, inside.shape)[inside], np.broadcast_to(columns, inside.shape)[inside]

    def each(values: NDArray[np.float64]) -> Image:
        return values.astype(np.float32)[which]

    amplitude = each(nuclei.irregularity * nuclei.axes.mean(axis=1))
    y = (rows_in - nuclei.position[which, 0]).astype(np.float32) + amplitude * shift_y[index]
    x = (columns_in - nuclei.position[which, 1]).astype(np.float32) + amplitude * shift_x[index]
    cosine, sine = each(np.cos(nuclei.angle)), each(np.sin(nuclei.angle))
    long, short = each(nuclei.axes[:, 0]), each(nuclei.axes[:, 1])
    q = np.sqrt(((x * cosine + y * sine) / long) ** 2 + ((y * cosine - x * sine) / short) ** 2)  # 1 on the outline
    edge = np.clip((1 - q) * short / np.float32(0.9) + np.float32(0.5), 0, 1)  # about one pixel wide
    rim = 0.74 + 0.40 * np.minimum(q, 1) ** 4  # chromatin gathers at the membrane
    spot = each(nuclei.nucleolus) * np.exp(-((q - 0.25) ** 2) * 40)
    value = each(nuclei.chromatin) * (rim + spot) * chromatin[index] * edge
    np.maximum.at(cover.reshape(-1), index, edge)
    np.maximum.at(haematoxylin.reshape(-1), index, value)
