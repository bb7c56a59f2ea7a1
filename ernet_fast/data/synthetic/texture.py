"""Random textures: smooth noise of a given grain, and wavy fibres."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]


@lru_cache(maxsize=256)
def _spline_taps(length: int, grain: float) -> tuple[NDArray[np.intp], Image]:
    """First of the four knots [length] each pixel depends on, and the knots' weights [4, length, 1].

    Knots lie `grain` pixels apart. The weights are the cubic B-spline's, scaled so that unit noise gives unit noise.
    """
    position = np.arange(length) / grain
    knot = np.floor(position).astype(np.intp)
    t = position - knot
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3])
    weights /= np.sqrt(np.mean(np.sum(weights**2, axis=0)))
    return knot, weights[:, :, None].astype(np.float32)


def _interpolated(knots: Image, length: int, grain: float) -> Image:
    """Spline along the first axis of `knots`."""
    # Written out: as a matrix product it would run on all cores, and stall where they are busy.
    knot, weights = _spline_taps(length, grain)
    total = weights[0] * knots[knot]
    for k in range(1, 4):
        total += weights[k] * knots[knot + k]
    return total


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], grain: float) -> Image:
    """Gaussian noise [H, W] of zero mean and about unit variance, with spots about `grain` >= 1 pixels wide."""
    grain = max(1.0, round(grain, 2))
    rows, columns = (int((length - 1) / grain) + 4 for length in shape)
    knots = rng.standard_normal((rows, columns), dtype=np.float32)
    across = _interpolated(knots, shape[0], grain)
    return np.ascontiguousarray(_interpolated(np.ascontiguousarray(across.T), shape[1], grain).T)


def fractal_noise(
    rng: np.random.Generator, shape: tuple[int, int], grain: float, octaves: int = 3, gain: float = 0.6
) -> Image:
    """`octaves` smooth noises, each of half the grain and `gain` times the height of the one before; unit variance."""
    total, norm = np.zeros(shape, np.float32), 0.0
    for octave in range(octaves):
        height = gain**octave
        total += np.float32(height) * smooth_noise(rng, shape, grain / 2**octave)
        norm += height**2
    total *= np.float32(norm**-0.5)
    return total


def fibre_texture(rng: np.random.Generator, across: Image, along: Image, thickness: float) -> Image:
    """Wavy fibres between 0 and 1: noise drawn out along the fibres, in two layers of different thickness.

    `across` and `along` [H, W] are coordinates in pixels across and along the fibres, which are about `thickness`
    pixels wide.
    """
    coarse = _streaks(rng, across, along, thickness, 9.0 * thickness)
    fine = _streaks(rng, across, along, 0.45 * thickness, 7.0 * thickness)
    return np.clip(0.5 + 0.30 * coarse + 0.20 * fine, 0, 1)


def _streaks(rng: np.random.Generator, across: Image, along: Image, thickness: float, length: float) -> Image:
    """Gaussian noise of about unit variance on curved coordinates, with spots `thickness` wide and `length` long."""
    grains = ((across, thickness), (along, length))
    position = [(axis - axis.min()) / np.float32(max(1.0, grain)) for axis, grain in grains]
    corner = [p.astype(np.int32) for p in position]
    # Smoothstep instead of straight lines: no creases at the knots.
    weight = [(t := p - k) * t * (3 - 2 * t) for p, k in zip(position, corner, strict=True)]
    rows, columns = (int(k.max()) + 2 for k in corner)
    knots = rng.standard_normal((rows, columns), dtype=np.float32).reshape(-1)
    index = corner[0] * columns + corner[1]
    near, far = (knots[i] + weight[1] * (knots[i + 1] - knots[i]) for i in (index, index + columns))
    return (near + weight[0] * (far - near)) * np.float32(1.35)  # the mean variance of the interpolation is 0.55
