"""Nuclei of images, found in the haematoxylin channel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernet_fast.segment.band_pass import band_pass
from ernet_fast.segment.regions import Regions, measure_regions, nuclear_regions
from ernet_fast.segment.settings import NucleiSettings
from ernet_fast.stain import MacenkoFit, MacenkoStatus, separate
from ernet_fast.stain.layout import read_images


@dataclass(frozen=True)
class SegmentedNuclei:
    """The n nuclei of one image of H x W pixels.

    Attributes:
        labels: [H, W] int32, 1 to n in a nucleus and 0 elsewhere.
        regions: position [n, 2], area [n] and the like; row k is of label k + 1.
        mpp: micrometres a pixel along y and x.
        status: of the fit of the image's stains; what is not OK was taken to be stained as published.
    """

    labels: NDArray[np.int32]
    regions: Regions
    mpp: tuple[float, float]
    status: MacenkoStatus

    @property
    def count(self) -> int:
        """Number of nuclei."""
        return len(self.regions.area)

    @property
    def field_mm2(self) -> float:
        """Area of the image in mm^2."""
        return self.labels.size * self.mpp[0] * self.mpp[1] / 1e6

    def figures(self) -> dict[str, Any]:
        """Count, density and shape as plain values; None where there is no nucleus to measure.

        Area and eccentricity are over the nuclei that no border of the image cuts.
        """
        whole = ~self.regions.at_border
        area, eccentricity = self.regions.area[whole], self.regions.eccentricity[whole]
        return {
            "nuclei": self.count,
            "whole_nuclei": int(whole.sum()),
            "density_per_mm2": self.count / self.field_mm2,
            "nuclear_share": float((self.labels > 0).mean()),
            "area_mean_um2": _of(np.mean, area),
            "area_median_um2": _of(np.median, area),
            "area_sd_um2": _of(np.std, area),
            "eccentricity_mean": _of(np.mean, eccentricity),
            "haematoxylin_mean": _of(np.mean, self.regions.haematoxylin),
            "stain_status": self.status.name.lower(),
        }


def _of(statistic: Any, values: NDArray[np.float64]) -> float | None:
    return float(statistic(values)) if len(values) else None


def nuclei(
    images: Any,
    *,
    mpp: float | tuple[float, float],
    settings: NucleiSettings | None = None,
    source: MacenkoFit | None = None,
    layout: str | None = None,
) -> Any:
    """Find the nuclei of H&E images: haematoxylin, band-pass in the frequency domain, threshold, watershed.

    The concentration of haematoxylin (`ernet_fast.stain.separate`) is filtered by `band_pass`, all images of one size
    at once and on their device. What exceeds the higher of Otsu's threshold and `settings.contrast` is nucleus; holes
    are filled and specks removed; the distance transform's maxima are the seeds of a watershed, which parts nuclei that
    touch. docs/segment.md has the steps, and what they reach against known nuclei.

    Args:
        images: uint8 or floating point, [3, H, W] or [H, W, 3], a batch of either, or a list of images of any sizes.
        mpp: micrometres a pixel, one number or (along y, along x).
        settings: what counts as a nucleus.
        source: stains of the images if they are known, e.g. those of the whole slide; estimated image by image by
            default, which needs an image with both stains.
        layout: "CHW" or "HWC" where a shape fits both.

    Returns:
        `SegmentedNuclei` of a single image; a list of them, in order, of a batch or a list.

    Raises:
        TypeError, ValueError: an argument does not fit, as in `separate`; `mpp` is no positive number or pair.
        ImportError: scikit-image is missing.
    """
    pixel = pixel_size(mpp)
    settings = settings or NucleiSettings()
    if isinstance(images, (list, tuple)):
        fits = _fit_of_each(source, len(images))
        return [
            nuclei(image, mpp=pixel, settings=settings, source=fit, layout=layout)
            for image, fit in zip(images, fits, strict=True)
        ]
    batch = read_images(images, layout)
    found = separate(batch.pixels, source, layout="CHW")
    haematoxylin = _finite(found.concentrations[:, 0])
    response = band_pass(haematoxylin, pixel, settings.finest, settings.coarsest)
    channels = zip(haematoxylin.cpu().numpy(), response.cpu().numpy(), found.status.tolist(), strict=True)
    results = [_one(h, r, pixel, MacenkoStatus(status), settings) for h, r, status in channels]
    return results[0] if batch.single else results


def _fit_of_each(source: MacenkoFit | None, count: int) -> list[MacenkoFit | None]:
    if source is None or len(source.stain_matrix) == 1:
        return [source] * count
    if len(source.stain_matrix) != count:
        raise ValueError(
            f"source holds {len(source.stain_matrix)} fits for {count} images; expected 1, or one an image."
        )
    return [MacenkoFit(*(part[k : k + 1] for part in source)) for k in range(count)]


def _finite(concentrations: Tensor) -> Tensor:
    """Pixels without a finite optical density are background."""
    return torch.nan_to_num(concentrations.detach(), 0.0, 0.0, 0.0)


def _one(
    haematoxylin: NDArray[Any], response: NDArray[Any], pixel: tuple[float, float], status: MacenkoStatus,
    settings: NucleiSettings,
) -> SegmentedNuclei:  # fmt: skip
    labels = nuclear_regions(haematoxylin, response, pixel, settings)
    return SegmentedNuclei(labels, measure_regions(labels, haematoxylin, pixel), pixel, status)


def pixel_size(mpp: float | tuple[float, float]) -> tuple[float, float]:
    """Micrometres along y and x; ValueError if `mpp` is no positive number or pair of them."""
    pair = mpp if isinstance(mpp, (tuple, list)) else (mpp, mpp)
    numbers = [isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < math.inf for v in pair]
    if len(pair) != 2 or not all(numbers):
        raise ValueError(f"mpp={mpp!r}; expected micrometres a pixel: a positive number, or a pair (along y, along x).")
    return float(pair[0]), float(pair[1])
