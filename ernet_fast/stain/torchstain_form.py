"""The shapes and dtypes that the torchstain package takes and returns, for code that relies on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ernet_fast.stain.layout import read_images


def check_compat(compat: str | None, percentile: str, range: float, layout: str | None) -> None:
    """Raise ValueError for an unknown package, or beside options that its conventions fix."""
    if compat is None:
        return
    if compat != "torchstain":
        raise ValueError(f"compat={compat!r}; expected 'torchstain' or None.")
    if percentile != "linear":
        raise ValueError(
            f"percentile={percentile!r} beside compat='torchstain', which takes 'nearest' for torch tensors and "
            "'linear' for NumPy arrays; leave percentile out."
        )
    if range != 255:
        raise ValueError(f"range={range!r} beside compat='torchstain', whose images are on the scale 0 to 255.")
    if layout is not None:
        raise ValueError(
            f"layout={layout!r} beside compat='torchstain', whose tensors are [3, H, W] and arrays [H, W, 3]."
        )


def read_as_torchstain(image: Any) -> None:
    """Raise unless torchstain takes this image: one torch tensor [3, H, W], or one NumPy array [H, W, 3].

    Raises:
        TypeError: no array, or a dtype that holds no RGB image.
        ValueError: another shape.
    """
    kind = "torch tensors [3, H, W]" if isinstance(image, torch.Tensor) else "NumPy arrays [H, W, 3]"
    layout = "CHW" if isinstance(image, torch.Tensor) else "HWC"
    if isinstance(image, (torch.Tensor, np.ndarray)) and (
        image.ndim != 3 or image.shape[0 if layout == "CHW" else 2] != 3
    ):
        raise ValueError(
            f"I has shape {tuple(image.shape)}; compat='torchstain' takes one image, as {kind}. "
            "Leave compat out for batches and other layouts."
        )
    read_images(image, layout, "I")


def as_torchstain(results: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """Tensors [3, H, W] as int32 [H, W, 3], arrays as uint8: truncated, NaN as 0."""
    image, haematoxylin, eosin = (None if result is None else _converted(result) for result in results)
    return image, haematoxylin, eosin


def _converted(image: Any) -> Any:
    if isinstance(image, torch.Tensor):
        image = image.nan_to_num(0.0) if image.is_floating_point() else image
        return image.permute(1, 2, 0).int()
    return image if image.dtype == np.uint8 else np.nan_to_num(image, nan=0.0).astype(np.uint8)
