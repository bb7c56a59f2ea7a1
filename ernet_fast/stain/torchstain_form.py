"""The shapes and dtypes that the torchstain package takes and returns, for code that relies on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ernet_fast.stain.layout import FLOAT_DTYPES, read_images
from ernet_fast.stain.upload import is_readable

BACKENDS = ("torch", "numpy")


def compat_of_backend(compat: str | None, backend: str | None) -> str | None:
    """`compat`, or that of torchstain where one of its backends is named; ValueError for an unknown backend."""
    if backend is None:
        return compat
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; expected one of torchstain's backends 'torch' and 'numpy', or None.")
    return "torchstain" if compat is None else compat


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


def read_torchstain(image: Any) -> torch.Tensor:
    """[3, H, W] of an image that torchstain takes: one torch tensor [3, H, W], or one NumPy array [H, W, 3].

    Integers of any width are levels. An array [3, H, W] is taken for what it is. Raises as `read_images`.
    """
    layout = "CHW" if isinstance(image, torch.Tensor) else "HWC"
    if isinstance(image, (torch.Tensor, np.ndarray)):
        if layout == "HWC" and image.ndim == 3 and image.shape[0] == 3 and image.shape[2] != 3:
            layout = "CHW"
        if image.ndim != 3 or image.shape[0 if layout == "CHW" else 2] != 3:
            kind = "torch tensors [3, H, W]" if isinstance(image, torch.Tensor) else "NumPy arrays [H, W, 3]"
            raise ValueError(
                f"I has shape {tuple(image.shape)}; compat='torchstain' takes one image, as {kind}. "
                "Leave compat out for batches and other layouts."
            )
        image = _levels(image)
    return read_images(image, layout, "I").pixels[0]


def _levels(image: Any) -> Any:
    """An image of wide integers as uint8, or, where its values do not fit or are not readable, as float32."""
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "iu" or image.dtype == np.uint8 or image.size == 0:
            return image
        fits = 0 <= image.min() and image.max() <= 255
        return image.astype(np.uint8 if fits else np.float32)
    if image.dtype in (torch.uint8, torch.bool, *FLOAT_DTYPES) or image.is_complex() or image.numel() == 0:
        return image
    image = image.long()  # torch finds no least uint16
    fits = is_readable(image) and 0 <= int(image.min()) and int(image.max()) <= 255
    return image.to(torch.uint8 if fits else torch.float32)


def as_torchstain(image: Any, results: tuple[Any, ...], tensor_dtype: torch.dtype = torch.int32) -> tuple[Any, ...]:
    """Results [3, H, W] of `image`: int32 [H, W, 3], or for an array uint8; truncated, NaN as 0."""
    converted = []
    for result in results:
        if result is not None:
            result = (result.nan_to_num(0.0) if result.is_floating_point() else result).permute(1, 2, 0)
            is_tensor = isinstance(image, torch.Tensor)
            result = result.to(tensor_dtype) if is_tensor else result.to(torch.uint8).numpy()
        converted.append(result)
    return tuple(converted)
