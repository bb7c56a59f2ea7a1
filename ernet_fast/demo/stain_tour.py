"""Stain normalisation, shown: pictures before and after, and how much more alike they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ernet_fast.data import Sample, read_image
from ernet_fast.train.images import evenly_chosen
from ernet_fast.train.pictures import before_after_picture
from ernet_fast.train.stain_choice import StainNormalization

_SHOWN = 6
_MEASURED = 48
_THUMBNAIL = 224


@dataclass(frozen=True)
class StainTour:
    """The picture, and the spread of the images' mean colours before and after, in grey levels."""

    picture: bytes
    spread_before: float
    spread_after: float
    measured: int


def show_normalization(samples: Sequence[Sample], target: Path, stain: StainNormalization, picture: Path) -> StainTour:
    """Normalise some images of different patients; writes the picture.

    The spread is the standard deviation, over up to 48 images, of an image's mean colour, averaged over the three
    channels.
    """
    patients: dict[str, Sample] = {}
    for sample in evenly_chosen(samples, None):
        patients.setdefault(sample.patient, sample)
    pairs = []
    for malignant in (0, 1):
        for sample in evenly_chosen([s for s in patients.values() if s.malignant == malignant], _SHOWN // 2):
            image = read_image(sample.path)
            kind = "malignant" if malignant else "benign"
            title = f"{kind}, {sample.magnification}X\npatient {sample.patient}"
            pairs.append((title, _thumbnail(image), _thumbnail(stain(image))))
    png = before_after_picture(pairs, _thumbnail(read_image(target)), picture)
    images = [read_image(sample.path) for sample in evenly_chosen(samples, _MEASURED)]
    return StainTour(png, _spread(images), _spread([stain(image) for image in images]), len(images))


def _thumbnail(image: Tensor) -> Tensor:
    """The centre square, not larger than 224 pixels."""
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[:, top : top + side, left : left + side]
    if side <= _THUMBNAIL:
        return square
    return F.interpolate(square[None], size=(_THUMBNAIL, _THUMBNAIL), mode="bilinear", antialias=True)[0]


def _spread(images: list[Tensor]) -> float:
    """Of the images' mean colours."""
    colours = torch.stack([image.double().mean(dim=(1, 2)) for image in images])
    return float(colours.std(dim=0, correction=0).mean())
