"""The stains of many 8-bit images together: of the image that holds all their pixels."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from ernet_fast.stain import operators
from ernet_fast.stain.colour_counts import ColourCounts
from ernet_fast.stain.options import Options
from ernet_fast.stain.reinhard import ReinhardFit, reinhard_fit
from ernet_fast.stain.result import MacenkoFit, MacenkoStatus, no_fit

JOINED_PIXELS = 1 << 23
"""Images of no more pixels together are fitted as one, which takes less time and memory than counting colours."""


def macenko_fit_together(images: Iterable[np.ndarray], options: Options) -> MacenkoFit:
    """The exact stains (B = 1) of images uint8 [H, W, 3] together, in 384 MiB whatever their number."""
    counts, few, pixels = None, [], 0
    for image in images:
        few.append(image.reshape(1, -1, 3))
        pixels += few[-1].shape[1]
        if pixels > JOINED_PIXELS:
            counts = counts or ColourCounts()
            counts.add(few.pop(0) if len(few) == 1 else np.concatenate(few, axis=1), layout="HWC")
            few.clear()
    if not pixels:
        return no_fit(1, MacenkoStatus.TOO_FEW_TISSUE_PIXELS, torch.device("cpu"))
    if counts is not None:
        o = options
        return counts.fit(Io=o.Io, alpha=o.alpha, beta=o.beta, percentile=o.percentile)
    joined = torch.from_numpy(np.concatenate(few, axis=1)[None]).permute(0, 3, 1, 2)
    return operators.fit(joined, options)


def reinhard_fit_together(images: Iterable[np.ndarray]) -> ReinhardFit:
    """Means and standard deviations (B = 1) over all pixels of images uint8 [H, W, 3], from those of each."""
    count, total, squares = 0, torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for image in images:
        fit = reinhard_fit(image, layout="HWC")
        n = image.shape[0] * image.shape[1]
        count += n
        total += n * fit.mean[0]
        squares += n * (fit.std[0].square() + fit.mean[0].square())
    status = MacenkoStatus.OK if count else MacenkoStatus.TOO_FEW_TISSUE_PIXELS
    mean = total / count if count else torch.full((3,), float("nan"), dtype=torch.float64)
    std = (squares / count - mean.square()).clamp_min(0).sqrt() if count else mean
    return ReinhardFit(mean[None], std[None], torch.tensor([int(status)], dtype=torch.int32))
