"""Architecture of breast tissue: glands, cell nests, stroma and gaps, as maps; and where the nuclei lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ernet_fast.data.synthetic.texture import Image, fibre_texture, fractal_noise, smooth_noise


@dataclass(frozen=True)
class TissueProfile:
    """What one tumour type looks like; lengths in micrometres."""

    nuclear_radius: float  # mean, of an epithelial nucleus
    pleomorphism: float  # of nuclear size (standard deviation of its logarithm), outline and chromatin
    spacing: float  # between epithelial nuclei
    gland_spacing: float = 0.0  # between glands with a lumen; 0 for solid growth
    gland_radius: float = 0.0  # outer
    nest_share: float = 0.0  # of the area covered by solid nests of tumour cells
    nest_size: float = 60.0  # width
    stromal_spacing: float = 22.0  # between spindle nuclei in the stroma
    gap_share: float = 0.05  # of the area without tissue (clefts, fat)
    mucin: float = 0.0  # 0 ... 1, how much of the stroma is replaced by pale mucin


# Nuclear density, size and pleomorphism tell the classes apart. Glands and solid sheets occur in both, as ductal
# hyperplasia is solid and well differentiated carcinoma has lumens. Subtypes differ in how much there is of either.
PROFILES: dict[str, TissueProfile] = {
    "A": TissueProfile(3.0, 0.10, 9.4, gland_spacing=62, gland_radius=21, nest_share=0.12, nest_size=40),
    "F": TissueProfile(2.9, 0.09, 9.2, gland_spacing=110, gland_radius=30, nest_share=0.16, stromal_spacing=19),
    "PT": TissueProfile(3.1, 0.12, 9.6, gland_spacing=130, gland_radius=40, nest_share=0.14, stromal_spacing=14),
    "TA": TissueProfile(
        3.0, 0.08, 9.2, gland_spacing=50, gland_radius=19, nest_share=0.20, nest_size=45, stromal_spacing=26
    ),
    "DC": TissueProfile(4.0, 0.24, 10.2, gland_spacing=95, gland_radius=26, nest_share=0.50, nest_size=75),
    "LC": TissueProfile(3.6, 0.20, 9.6, nest_share=0.45, nest_size=24, gap_share=0.04),
    "MC": TissueProfile(3.9, 0.21, 10.0, gland_spacing=120, gland_radius=28, nest_share=0.42, nest_size=55, mucin=0.9),
    "PC": TissueProfile(
        4.0, 0.22, 9.8, gland_spacing=85, gland_radius=24, nest_share=0.48, nest_size=40, gap_share=0.10
    ),
}


class Tissue(NamedTuple):
    """Maps [H, W] of one field of view, between 0 and 1, and the nuclei that line its glands."""

    epithelium: Image  # what this, stroma and mucin leave is empty
    stroma: Image
    mucin: Image
    fibres: Image
    angle: Image  # of the fibres, radians
    lining: NDArray[np.float64]  # rows (y, x, angle) in pixels and radians


def draw_tissue(rng: np.random.Generator, profile: TissueProfile, shape: tuple[int, int], pixel: float) -> Tissue:
    """Lay out a field of `shape` pixels, each `pixel` micrometres wide."""
    across, along, angle = _fibre_field(rng, shape, pixel)
    fibres = fibre_texture(rng, across, along, 3.2 / pixel)
    solid = _threshold(fractal_noise(rng, shape, profile.nest_size / pixel), profile.nest_share, 0.12)
    lining, epithelium, lumen = _glands(rng, profile, shape, pixel)
    epithelium = np.maximum(epithelium, solid * (1 - lumen))
    # Clefts follow the fibres and open where the tissue is loose.
    loose = fractal_noise(rng, shape, 45.0 / pixel) - 0.9 * fibres
    gap = _threshold(loose, profile.gap_share, 0.10) * (1 - 0.85 * epithelium)
    tissue = (1 - lumen) * (1 - gap)
    pool = np.zeros_like(gap)
    if profile.mucin:
        pool = _threshold(smooth_noise(rng, shape, 70.0 / pixel), 0.7, 0.2) * np.float32(profile.mucin)
    epithelium = epithelium * tissue
    rest = np.maximum(tissue - epithelium, 0)
    return Tissue(epithelium, rest * (1 - pool), rest * pool, fibres, angle, lining)


def nuclei_grid(rng: np.random.Generator, shape: tuple[int, int], spacing: float) -> NDArray[np.float64]:
    """Positions (y, x) [n, 2] in pixels: a hexagonal grid `spacing` pixels wide over the field, turned and jittered."""
    reach = 0.5 * np.hypot(*shape) + 2 * spacing
    steps = int(np.ceil(reach / spacing))
    i, j = np.meshgrid(np.arange(-steps, steps + 1), np.arange(-steps, steps + 1), indexing="ij")
    points = np.stack([i * (np.sqrt(3) / 2), j + 0.5 * (i % 2)], axis=-1).reshape(-1, 2) * spacing
    points += rng.normal(scale=0.20 * spacing, size=points.shape)
    turn = rng.uniform(0, np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = points @ rotation + np.array(shape) / 2 + rng.uniform(-0.5, 0.5, 2) * spacing
    return points[np.all((points > -spacing) & (points < np.array(shape) + spacing), axis=1)]


def _threshold(field: Image, share: float, softness: float) -> Image:
    """Soft mask of the highest `share` of a field of about unit variance."""
    if share <= 0:
        return np.zeros_like(field)
    level = np.quantile(field[::4, ::4], 1 - share)
    return np.clip((field - level) / np.float32(softness) + 0.5, 0, 1).astype(np.float32)


def _fibre_field(rng: np.random.Generator, shape: tuple[int, int], pixel: float) -> tuple[Image, Image, Image]:
    """Coordinates in pixels across and along the fibres, and the fibres' angle."""
    y, x = np.meshgrid(np.arange(shape[0], dtype=np.float32), np.arange(shape[1], dtype=np.float32), indexing="ij")
    turn = rng.uniform(0, np.pi)
    bend = smooth_noise(rng, shape, 90.0 / pixel) * np.float32(26.0 / pixel)
    bend += smooth_noise(rng, shape, 35.0 / pixel) * np.float32(6.5 / pixel)
    across = np.float32(np.cos(turn)) * y - np.float32(np.sin(turn)) * x + bend
    along = np.float32(np.cos(turn)) * x + np.float32(np.sin(turn)) * y
    dy, dx = np.gradient(across)
    return across, along, np.arctan2(-dx, dy).astype(np.float32)


def _glands(
    rng: np.random.Generator, profile: TissueProfile, shape: tuple[int, int], pixel: float
) -> tuple[NDArray[np.float64], Image, Image]:
    """Nuclei lining the glands (y, x, angle), and the maps of their epithelium and lumen."""
    epithelium, lumen = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    lining = [np.zeros((0, 3))]
    if profile.gland_spacing <= 0:
        return lining[0], epithelium, lumen
    wobble = smooth_noise(rng, shape, 28.0 / pixel) * np.float32(2.4 / pixel)
    for cy, cx in nuclei_grid(rng, shape, profile.gland_spacing / pixel):
        radius = profile.gland_radius * np.exp(rng.normal(scale=0.22)) / pixel
        stretch, turn = np.exp(rng.uniform(0, 0.45)), rng.uniform(0, np.pi)
        thickness = (1.0 if rng.random() < 0.6 else 1.7) * profile.spacing / pixel
        reach = int(radius * stretch + thickness) + 3
        top, left = max(0, int(cy) - reach), max(0, int(cx) - reach)
        window = np.s_[top : max(0, int(cy) + reach + 1), left : max(0, int(cx) + reach + 1)]
        if wobble[window].size == 0:
            continue
        y = (np.arange(window[0].start, window[0].start + wobble[window].shape[0]) - cy)[:, None]
        x = (np.arange(window[1].start, window[1].start + wobble[window].shape[1]) - cx)[None, :]
        along, athwart = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        distance = np.hypot(along / stretch, athwart * stretch) + wobble[window]
        inner = max(0.25 * radius, radius - thickness)
        for area, edge in ((lumen[window], inner), (epithelium[window], radius + 0.1 * thickness)):
            np.maximum(area, np.clip((edge - distance) / (1.2 / pixel) + 0.5, 0, 1), out=area)
        ring = _ring(rng, inner, radius, stretch, turn, profile.spacing / pixel)
        lining += [np.add(row, (cy, cx, 0.0)) for row in ring]
    epithelium *= 1 - lumen
    return np.concatenate(lining), epithelium, lumen


def _ring(
    rng: np.random.Generator, inner: float, outer: float, stretch: float, turn: float, spacing: float
) -> Iterator[NDArray[np.float64]]:
    """One or two rows of nuclei between the radii of a gland, about its centre, standing upright on its wall."""
    rows = max(1, round((outer - inner) / spacing))
    for row in range(rows):
        r = inner + (row + 0.5) * (outer - inner) / rows
        count = max(3, int(2 * np.pi * r / (0.80 * spacing)))
        phi = (np.arange(count) + rng.uniform(-0.22, 0.22, count)) * (2 * np.pi / count)
        along = r * stretch * np.cos(phi) + rng.normal(scale=0.10 * spacing, size=count)
        athwart = r / stretch * np.sin(phi) + rng.normal(scale=0.10 * spacing, size=count)
        x, y = along * np.cos(turn) - athwart * np.sin(turn), along * np.sin(turn) + athwart * np.cos(turn)
        yield np.stack([y, x, phi + turn], axis=1)
