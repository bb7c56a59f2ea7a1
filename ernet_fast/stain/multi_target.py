"""One target from several images.

Two of the ways of the torchstain package's multi-target normaliser (D. Ivanov et al., "Multi-target stain normalization
for histology slides", arXiv:2406.02077):

- "concat": HE and maxC of the image that holds the pixels of all targets. Large images count for more.
- "avg": the arithmetic means of the targets' HE and of their maxC, each target fitted alone ("avg-post" there). Columns
  of the mean HE are a little shorter than 1, and stay so, as there.
"""

from __future__ import annotations

from typing import Any

import torch

from ernet_fast.stain import pipeline
from ernet_fast.stain.collection import Collection, Part, read_collection
from ernet_fast.stain.layout import ImageBatch
from ernet_fast.stain.options import Options
from ernet_fast.stain.result import MacenkoFit, describe_failures
from ernet_fast.stain.tissue_mask import pixels_of_masks

TARGETS = ("concat", "avg")


def fit_targets(images: Any, targets: str | None, mask: Any, options: Options) -> MacenkoFit:
    """Stains [1, 3, 2] and maxima [1, 2] of one target image, or of several together; ValueError if none."""
    if targets is not None and targets not in TARGETS:
        raise ValueError(f"targets={targets!r}; expected 'concat', 'avg' or None for one target image.")
    collection = read_collection(images, options.layout, "I")
    if collection.count == 0 or (collection.count > 1 and targets is None):
        hint = " Say how several make one: targets='concat' or targets='avg'." if collection.count else ""
        raise ValueError(f"fit takes one target image; got {collection.count}.{hint}")
    pipeline.check_range(collection, options.range)
    if targets == "concat":
        fit = pipeline.fit(_joined(collection, mask, options.range), options)
    else:
        fit = pipeline.fit(collection, options, mask)
    if failures := describe_failures(fit.status):
        several = " of all targets together" if targets == "concat" else ""
        raise ValueError(
            f"the target cannot be fitted ({failures}{several}). Choose a target image with tissue of both stains."
        )
    return MacenkoFit(
        fit.stain_matrix.mean(dim=0, keepdim=True), fit.max_concentration.mean(dim=0, keepdim=True), fit.status[:1]
    )


def _joined(collection: Collection, mask: Any, range: float) -> Collection:
    """One image [1, 3, 1, n] of the (masked) pixels of all."""
    if mask is None:
        images = collection.in_order([part.pixels for part in collection.parts])
        pixels = [image.reshape(1, 3, 1, -1) for image in images]
    else:
        pixels = pixels_of_masks(collection, mask)
    if len({part.dtype for part in pixels}) > 1:
        pixels = [part.double() * (range / 255 if part.dtype == torch.uint8 else 1) for part in pixels]
    joined = torch.cat(pixels, dim=3)
    # A mask may leave nothing; one white pixel has no tissue either.
    joined = joined if joined.shape[3] else joined.new_full((1, 3, 1, 1), 255 if joined.dtype == torch.uint8 else range)
    return Collection([Part(joined, None)], 1, ImageBatch(joined))
