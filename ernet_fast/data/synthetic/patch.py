"""One synthetic H&E patch: tissue and nuclei as stain concentrations, then Beer-Lambert."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ernet_fast.data.layout import MAGNIFICATIONS, SUBTYPES
from ernet_fast.data.pixel_size import breakhis_mpp
from ernet_fast.data.synthetic.nuclei import Nuclei, paint_nuclei
from ernet_fast.data.synthetic.stain import StainProfile, beer_lambert, sample_stain
from ernet_fast.data.synthetic.texture import Image, fractal_noise, smooth_noise
from ernet_fast.data.synthetic.tissue import PROFILES, Tissue, TissueProfile, draw_tissue, nuclei_grid

_SENSOR_NOISE = 1.2  # standard deviation, grey levels

Field = NDArray[np.float64]


class SyntheticPatch(NamedTuple):
    """An image and what it was made of."""

    image: NDArray[np.uint8]  # [3, H, W]
    concentrations: NDArray[np.float32]  # [2, H, W], of haematoxylin and eosin, before `stain.strength`
    stain: StainProfile
    nuclear_cover: NDArray[np.float32]  # [H, W], the share of each pixel that is nucleus
    nuclei: Nuclei  # every nucleus that was painted, those that reach into the field from outside included
    mpp: float  # micrometres a pixel


def generate_patch(
    subtype: str = "DC",
    *,
    magnification: int = 200,
    size: tuple[int, int] = (224, 224),
    stain: StainProfile | None = None,
    seed: int | list[int] | np.random.SeedSequence = 0,
    noise: float = _SENSOR_NOISE,
) -> SyntheticPatch:
    """Draw one patch of a tumour type; equal arguments give equal bytes on one machine.

    The height of the field of view depends on the magnification alone (152 um at 200X): `size` says how finely it is
    sampled, as when a BreakHis image of 700x460 is resized.

    Args:
        subtype: one of the codes A, F, PT, TA (benign), DC, LC, MC, PC (malignant).
        magnification: 40, 100, 200 or 400.
        size: (height, width) in pixels, at least 32 each.
        stain: stain vectors and intensities; None draws some from `seed`.
        seed: anything `numpy.random.default_rng` takes.
        noise: standard deviation of the sensor noise in grey levels.

    Raises:
        ValueError: an argument is out of range.
    """
    if subtype not in SUBTYPES:
        raise ValueError(f"subtype={subtype!r}; expected one of {', '.join(SUBTYPES)}")
    if magnification not in MAGNIFICATIONS:
        raise ValueError(f"magnification={magnification}; expected one of {MAGNIFICATIONS}")
    if len(size) != 2 or min(size) < 32:
        raise ValueError(f"size={size!r}; expected (height, width), each at least 32 pixels")
    if not 0 <= noise < 100:
        raise ValueError(f"noise={noise}; expected grey levels between 0 and 100")
    rng = np.random.default_rng(seed)
    if stain is None:
        stain = sample_stain(rng)
    shape = int(size[0]), int(size[1])
    pixel = breakhis_mpp(magnification, shape[0])
    profile = PROFILES[subtype]
    tissue = draw_tissue(rng, profile, shape, pixel)
    nuclei = _place_nuclei(rng, profile, tissue, pixel)
    cover, chromatin = paint_nuclei(rng, nuclei, shape)
    concentrations = _concentrations(rng, tissue, cover, chromatin, pixel)
    light = beer_lambert(concentrations, stain)
    if noise:
        light += np.float32(noise) * rng.standard_normal(light.shape, dtype=np.float32)
    image = np.clip(light + np.float32(0.5), 0, 255).astype(np.uint8)
    return SyntheticPatch(image, concentrations, stain, cover, nuclei, pixel)


def _place_nuclei(rng: np.random.Generator, profile: TissueProfile, tissue: Tissue, pixel: float) -> Nuclei:
    shape = tissue.stroma.shape
    lining = tissue.lining[_sample(tissue.epithelium, tissue.lining[:, :2]) > 0.5]
    packed = nuclei_grid(rng, shape, profile.spacing / pixel) if profile.nest_share else np.zeros((0, 2))
    packed = packed[_sample(tissue.epithelium, packed) > 0.6]
    epithelial = np.concatenate([lining[:, :2], packed])
    angle = np.concatenate([lining[:, 2], rng.uniform(0, np.pi, len(packed))])
    spindle = nuclei_grid(rng, shape, profile.stromal_spacing / pixel)
    spindle = spindle[_sample(tissue.stroma, spindle) > rng.uniform(0.3, 1.2, len(spindle))]
    direction = _sample(tissue.angle, spindle) + rng.normal(scale=0.15, size=len(spindle))
    round_ones = _draw(rng, epithelial, angle, profile.nuclear_radius / pixel, profile.pleomorphism, elongation=1.22)
    spindles = _draw(rng, spindle, direction, 2.5 / pixel, 0.12, elongation=2.3)
    return Nuclei(*map(np.concatenate, zip(round_ones, spindles, strict=True)))


def _draw(
    rng: np.random.Generator, position: Field, angle: Field, radius: float, pleomorphism: float, elongation: float
) -> Nuclei:
    count = len(position)
    size = radius * np.exp(rng.normal(scale=pleomorphism, size=count))
    ratio = np.sqrt(elongation * np.exp(rng.normal(scale=0.10 + 0.4 * pleomorphism, size=count)))
    darkness = 1.05 * np.exp(rng.normal(scale=0.08 + 0.6 * pleomorphism, size=count))
    irregularity = np.full(count, 0.05 + 0.5 * pleomorphism)
    nucleolus = np.where(rng.random(count) < 2 * pleomorphism, 0.35, 0.0)
    axes = np.stack([size * ratio, size / ratio], axis=1)
    return Nuclei(position, axes, angle, np.clip(darkness, 0.6, 2.0), irregularity, nucleolus)


def _sample(field: Image, position: Field) -> Field:
    """The field at positions (y, x), the border's value beyond it."""
    index = np.clip(np.round(position).astype(int), 0, np.array(field.shape) - 1)
    return field[index[:, 0], index[:, 1]].astype(np.float64)


def _concentrations(rng: np.random.Generator, tissue: Tissue, cover: Image, chromatin: Image, pixel: float) -> Image:
    grain = fractal_noise(rng, cover.shape, 6.0 / pixel)
    patchy = smooth_noise(rng, cover.shape, 60.0 / pixel)
    collagen = (0.18 + 0.75 * tissue.fibres) * np.clip(1 + 0.12 * grain + 0.28 * patchy, 0.2, 2)
    cytoplasm = 0.52 * np.clip(1 + 0.22 * grain + 0.12 * patchy, 0.2, 2)
    between = 1 - cover
    eosin = (tissue.stroma * collagen + tissue.epithelium * cytoplasm + 0.10 * tissue.mucin) * (0.15 + 0.85 * between)
    basophilia = tissue.epithelium * 0.22 * np.clip(1 + 0.35 * grain, 0, 2)
    basophilia = basophilia + tissue.stroma * (0.02 + 0.03 * tissue.fibres) + tissue.mucin * 0.16 * (1 + 0.3 * grain)
    haematoxylin = chromatin + basophilia * between
    return np.maximum(np.stack([haematoxylin, eosin]), 0).astype(np.float32)
