"""From a filtered haematoxylin channel to separate regions, and their measures."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ernet_fast._optional import require
from ernet_fast.segment.settings import NucleiSettings


class Regions(NamedTuple):
    """Measures of n nuclei."""

    position: NDArray[np.float64]  # [n, 2]: y, x of the centre of mass, pixels
    area: NDArray[np.float64]  # [n], um^2
    eccentricity: NDArray[np.float64]  # [n], of the ellipse of the same second moments: 0 a circle, below 1
    axes: NDArray[np.float64]  # [n, 2]: major and minor axis of that ellipse, um
    haematoxylin: NDArray[np.float64]  # [n], mean concentration, units of optical density
    at_border: NDArray[np.bool_]  # [n], cut by a border of the image


def _skimage(module: str) -> Any:
    return require(f"skimage.{module}", extra="segment", purpose="segmenting nuclei")


def nuclear_regions(
    haematoxylin: NDArray[Any], response: NDArray[Any], pixel: tuple[float, float], settings: NucleiSettings
) -> NDArray[np.int32]:
    """Labels [H, W], 1 to n, of a haematoxylin channel [H, W] and its band-passed `response`.

    `pixel`: um along y and x.
    """
    filters, feature, segmentation = map(_skimage, ("filters", "feature", "segmentation"))
    ndimage = require("scipy.ndimage", extra="segment", purpose="segmenting nuclei")
    threshold = settings.contrast
    if response.min() < response.max():
        threshold = max(threshold, float(filters.threshold_otsu(response)))
    dark = haematoxylin > settings.share * np.percentile(haematoxylin, 99)
    mask = ndimage.binary_fill_holes((response > threshold) & dark)
    mask = ndimage.binary_opening(mask, _ellipse(settings.thinnest / 2, pixel))
    distance = ndimage.distance_transform_edt(mask, sampling=pixel)
    distance = ndimage.gaussian_filter(distance, [settings.smooth / side for side in pixel])
    around = _ellipse(max(settings.separation, *pixel), pixel)  # the next pixels at least
    seeds = feature.peak_local_max(distance, footprint=around, labels=mask.astype(np.int32), exclude_border=False)
    seeds = seeds[np.lexsort(seeds.T[::-1])]  # numbered from top to bottom
    markers = np.zeros(mask.shape, np.int32)
    markers[tuple(seeds.T)] = np.arange(1, len(seeds) + 1)
    return _of_right_size(segmentation.watershed(-distance, markers, mask=mask), pixel, settings)


def _ellipse(radius: float, pixel: tuple[float, float]) -> NDArray[np.bool_]:
    """The pixels whose centres lie within `radius` um of the middle one's, itself among them."""
    reach = [int(radius / side) for side in pixel]
    y, x = np.ogrid[-reach[0] : reach[0] + 1, -reach[1] : reach[1] + 1]
    return (y * pixel[0]) ** 2 + (x * pixel[1]) ** 2 <= radius**2


def _of_right_size(labels: NDArray[Any], pixel: tuple[float, float], settings: NucleiSettings) -> NDArray[np.int32]:
    """The regions of an area that a nucleus may have, numbered 1 to n."""
    area = np.bincount(labels.ravel()) * pixel[0] * pixel[1]
    keep = (settings.min_area <= area) & (area <= settings.max_area)
    keep[0] = False
    number = np.where(keep, np.cumsum(keep), 0).astype(np.int32)
    return number[labels]


_PROPERTIES = ("centroid", "area", "eccentricity", "axis_major_length", "axis_minor_length", "mean_intensity", "bbox")


def measure_regions(labels: NDArray[np.int32], haematoxylin: NDArray[Any], pixel: tuple[float, float]) -> Regions:
    """Measures of the regions 1 to n of `labels` [H, W], and their mean `haematoxylin` [H, W]."""
    table = _skimage("measure").regionprops_table(labels, haematoxylin, properties=_PROPERTIES, spacing=pixel)
    column = {name: np.asarray(values, np.float64) for name, values in table.items()}
    height, width = labels.shape
    top, left, bottom, right = (column[f"bbox-{k}"] for k in range(4))
    return Regions(
        position=np.stack([column["centroid-0"] / pixel[0], column["centroid-1"] / pixel[1]], axis=1),
        area=column["area"],
        eccentricity=column["eccentricity"],
        axes=np.stack([column["axis_major_length"], column["axis_minor_length"]], axis=1),
        haematoxylin=column["mean_intensity"],
        at_border=(top == 0) | (left == 0) | (bottom == height) | (right == width),
    )
