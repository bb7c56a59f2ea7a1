"""Images as users hold them, seen as one tensor [B, 3, H, W], and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
IMAGE_DTYPES = frozenset((torch.uint8, *FLOAT_DTYPES))
LAYOUTS = ("CHW", "HWC")


class ImageBatch(NamedTuple):
    """Images as [B, 3, H, W] and what is needed to give results the caller's form."""

    pixels: torch.Tensor  # a view of the caller's memory, never written to
    channels_last: bool = False  # the caller's arrays are [..., H, W, 3]
    single: bool = False  # without a batch dimension
    is_numpy: bool = False
    subclassed: torch.Tensor | None = None  # what the caller gave, where it is of a subclass of torch.Tensor

    def restore(self, images: torch.Tensor) -> Any:
        """Give `images` [B, 3, H, W] the layout and the kind of array of the input; a subclass decides on its own."""
        if self.is_numpy:  # views in NumPy, which makes them several times as fast
            array = images.numpy()
            array = array.transpose(0, 2, 3, 1) if self.channels_last else array
            return array[0] if self.single else array
        if self.channels_last:
            images = images.permute(0, 2, 3, 1)
        if self.single:
            images = images[0]
        if self.subclassed is None:
            return images
        return torch.overrides.handle_torch_function(_result_of, (self.subclassed,), self.subclassed, images)


def _result_of(images: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """`result`, which was computed of `images`."""
    return result


def _is_subclassed(tensor: torch.Tensor) -> bool:
    """True for images with metadata and the like; torch's own wrappers (fake tensors, ...) and parameters are none."""
    kind = type(tensor)
    plain_dispatch = getattr(kind, "__torch_dispatch__", None) is torch.Tensor.__torch_dispatch__
    return kind is not torch.Tensor and plain_dispatch and torch.overrides.has_torch_function((tensor,))


def read_images(images: Any, layout: str | None = None, name: str = "images") -> ImageBatch:
    """See uint8 or floating-point [3, H, W], [H, W, 3] or a batch of either as [B, 3, H, W], without copying.

    Raises:
        TypeError: no array, or a dtype that holds no RGB image.
        ValueError: the shape is no RGB image, or fits both layouts.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}; expected 'CHW', 'HWC' or None.")
    if isinstance(images, np.ndarray):
        return _read_array(_readable_array(images, name), layout, name)
    tensor, subclassed = images, None
    if type(images) is not torch.Tensor:
        if not isinstance(images, torch.Tensor):
            hint = "; numpy.asarray of it is one." if hasattr(images, "__array_interface__") else "."
            raise TypeError(f"{name} is a {type(images).__name__}; expected a torch tensor or a NumPy array{hint}")
        if _is_subclassed(images):
            tensor, subclassed = images.as_subclass(torch.Tensor), images
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} is a tensor of layout {tensor.layout}; expected a dense one (.to_dense()).")
    if tensor.dtype not in IMAGE_DTYPES:
        raise _wrong_dtype(tensor.dtype, name)
    shape = tuple(tensor.shape)
    channels_last = is_channels_last(shape, layout, name)
    single = len(shape) == 3
    batch = tensor.unsqueeze(0) if single else tensor
    if channels_last:
        batch = batch.permute(0, 3, 1, 2)
    return ImageBatch(batch, channels_last, single, False, subclassed)


def _read_array(array: np.ndarray, layout: str | None, name: str) -> ImageBatch:
    """See an array that torch.from_numpy takes as `read_images` does, by views in NumPy."""
    channels_last = is_channels_last(array.shape, layout, name)
    single = array.ndim == 3
    batch = array[None] if single else array
    tensor = torch.from_numpy(batch.transpose(0, 3, 1, 2) if channels_last else batch)
    if tensor.dtype not in IMAGE_DTYPES:
        raise _wrong_dtype(tensor.dtype, name)
    return ImageBatch(tensor, channels_last, single, True)


def _wrong_dtype(dtype: torch.dtype, name: str) -> TypeError:
    return TypeError(
        f"{name} has dtype {str(dtype).removeprefix('torch.')}; expected uint8 or a floating-point type. "
        "Convert 8-bit values held in wider integers with .to(torch.uint8) or .astype('uint8')."
    )


def _readable_array(array: np.ndarray, name: str) -> np.ndarray:
    """`array`, or the same pixels as torch.from_numpy takes them."""
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; pass its .data and, for fits, mask=~array.mask.any(axis=-1).")
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise TypeError(f"{name} has dtype {array.dtype}; expected uint8 or a floating-point type.")
    if not array.dtype.isnative:
        raise TypeError(f"{name} has dtype {array.dtype}, not in native byte order; use .astype('{array.dtype.name}').")
    if any(stride < 0 for stride in array.strides):
        array = array.copy()  # torch has no negative strides
    if not array.flags.writeable:
        # torch.from_numpy warns about read-only memory; nothing here writes to it.
        array = np.asarray(_WritableView(array))
    return array


class _WritableView:
    """The memory of a read-only array under an interface that does not say so."""

    def __init__(self, array: np.ndarray) -> None:
        self._keep = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.__array_interface__["data"][0], False)}


def is_channels_last(shape: tuple[int, ...], layout: str | None, name: str) -> bool:
    """True for the shape [H, W, 3] or a batch of it, False for [3, H, W]; ValueError if it may be neither or both."""
    if len(shape) not in (3, 4):
        hint = " A grey image has no stains to separate." if len(shape) == 2 else ""
        raise ValueError(f"{name} has shape {shape}; expected [3, H, W], [H, W, 3] or a batch of them.{hint}")
    last = _channel_is_last(shape, layout, name)
    if 0 in (shape[-3:-1] if last else shape[-2:]):
        raise ValueError(f"{name} has shape {shape}: an image without pixels cannot be fitted.")
    return last


def _channel_is_last(shape: tuple[int, ...], layout: str | None, name: str) -> bool:
    first, last = shape[-3], shape[-1]
    if layout is not None:
        found = last if layout == "HWC" else first
        if found != 3:
            raise ValueError(f"{name} has shape {shape}, with {found} channels as {layout}; expected 3 (RGB).")
        return layout == "HWC"
    if first == 3 and last == 3:
        raise ValueError(f"{name} has shape {shape}, which fits [3, H, W] and [H, W, 3]; pass layout='CHW' or 'HWC'.")
    if first != 3 and last != 3:
        hint = ""
        if 4 in (first, last):
            hint = " Drop the alpha channel of RGBA images first (image[..., :3] or image[:3])."
        elif 1 in (first, last):
            hint = " A grey image has no stains to separate."
        raise ValueError(f"{name} has shape {shape}; expected 3 channels (RGB), first or last.{hint}")
    return last == 3
