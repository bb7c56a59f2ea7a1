"""Fits that look at some pixels of an image only: the fit of an image made of its masked pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ernet_fast.stain import operators
from ernet_fast.stain.collection import Collection
from ernet_fast.stain.options import Options
from ernet_fast.stain.result import MacenkoFit, MacenkoStatus, no_fit
from ernet_fast.stain.upload import to_device


def read_masks(mask: Any, collection: Collection) -> list[torch.Tensor]:
    """One boolean mask [H, W] an image, on the images' device, of [B, H, W], [H, W] or a list of [H, W].

    Raises TypeError for what is no boolean array, ValueError for shapes that differ from those of the images.
    """
    sizes = [image.shape[1:] for image in collection.in_order([part.pixels for part in collection.parts])]
    if isinstance(mask, (list, tuple)):
        masks = [_as_tensor(one, f"mask[{i}]") for i, one in enumerate(mask)]
    else:
        whole = _as_tensor(mask, "mask")
        masks = [whole] if whole.ndim == 2 else list(whole) if whole.ndim == 3 else [whole]
    if len(masks) != len(sizes):
        raise ValueError(f"mask holds {len(masks)} masks for {len(sizes)} images; expected one [H, W] an image.")
    for i, (one, size) in enumerate(zip(masks, sizes, strict=True)):
        if one.shape != size:
            raise ValueError(f"the mask of image {i} has shape {tuple(one.shape)}; the image has {tuple(size)}.")
    return [to_device(one, collection.device) for one in masks]


def _as_tensor(mask: Any, name: str) -> torch.Tensor:
    if not isinstance(mask, (torch.Tensor, np.ndarray)):
        raise TypeError(f"{name} is a {type(mask).__name__}; expected a boolean torch tensor or NumPy array.")
    if mask.dtype not in (torch.bool, np.dtype(bool)):
        raise TypeError(f"{name} has dtype {mask.dtype}; expected booleans, e.g. mask > 0.")
    # A copy, as torch warns about read-only arrays and has no negative strides.
    return mask if isinstance(mask, torch.Tensor) else torch.from_numpy(mask.copy())


def pixels_of_masks(collection: Collection, mask: Any) -> list[torch.Tensor]:
    """The n masked pixels of each image as an image [1, 3, 1, n]. Raises as `read_masks`."""
    masks = read_masks(mask, collection)
    images = collection.in_order([part.pixels for part in collection.parts])
    return [image[:, one].reshape(1, 3, 1, -1) for image, one in zip(images, masks, strict=True)]


def fit_inside(collection: Collection, mask: Any, options: Options) -> MacenkoFit:
    """Stains of the masked pixels of every image: together where the device takes masks, else copied out."""
    if collection.parts and operators.is_composed(collection.parts[0].pixels):
        masks, fits = read_masks(mask, collection), []
        for part in collection.parts:
            inside = torch.stack([masks[i] for i in part.index or range(len(masks))])
            fits.append(operators.fit(part.pixels, options, inside.flatten(1)))
        return collection.gather_fit(fits)
    fits = [
        operators.fit(inside, options)
        if inside.shape[3]
        else no_fit(1, MacenkoStatus.TOO_FEW_TISSUE_PIXELS, inside.device)
        for inside in pixels_of_masks(collection, mask)
    ]
    if not fits:
        return collection.gather_fit([operators.fit(part.pixels, options) for part in collection.parts])
    return MacenkoFit(*map(torch.cat, zip(*fits, strict=True)))
