"""A batch, or a list of images of several sizes, as parts that are worked on whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ernet_fast.stain.layout import ImageBatch, read_images
from ernet_fast.stain.result import MacenkoFit, MacenkoStatus, no_fit
from ernet_fast.stain.upload import index_on

STACKED_PIXELS = 1 << 18
"""Images of a list below this size are stacked with others of their shape, so that threads share them; larger ones are
shared by the threads one after the other and need no copy."""


@dataclass(slots=True)
class Part:
    """Images of one shape."""

    pixels: torch.Tensor  # [b, 3, H, W], never written to
    index: list[int] | None  # where these images stand in the collection; None for all of them, in order

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of these images, of one row for all or of one row each."""
        if self.index is None or rows.shape[0] == 1:
            return rows
        return rows[index_on(self.index, rows.device)]

    def take_fit(self, fit: MacenkoFit) -> MacenkoFit:
        """The stains of these images."""
        return fit if self.index is None else MacenkoFit(*(self.take(part) for part in fit))


@dataclass(slots=True)
class Collection:
    """Images as the caller gave them, in parts."""

    parts: list[Part]
    count: int  # of images
    forms: ImageBatch | list[ImageBatch]  # how to give results back; a list for a list of images

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.parts[0].pixels.device if self.parts else torch.device("cpu")

    def gather(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Rows of every part as one tensor in the collection's order."""
        if self.parts[0].index is None:
            return rows[0]
        order = [i for part in self.parts for i in part.index or []]
        inverse = [0] * len(order)
        for place, i in enumerate(order):
            inverse[i] = place
        return torch.cat(list(rows))[index_on(inverse, rows[0].device)]

    def gather_fit(self, fits: Sequence[MacenkoFit]) -> MacenkoFit:
        """Stains of every part as those of the collection."""
        if not self.parts:
            return no_fit(0, MacenkoStatus.OK, "cpu")
        if self.parts[0].index is None:
            return fits[0]
        return MacenkoFit(*map(self.gather, zip(*fits, strict=True)))

    def in_order(self, results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The single images of every part in the collection's order, as views."""
        found: dict[int, torch.Tensor] = {}
        for part, result in zip(self.parts, results, strict=True):
            found.update(zip(part.index or range(len(result)), result, strict=True))
        return [found[i] for i in range(self.count)]

    def as_tensors(self, results: Sequence[torch.Tensor]) -> Any:
        """Results [b, C, H, W] of every part as a tensor [B, C, H, W], [C, H, W] for a single image, or a list."""
        if isinstance(self.forms, list):
            return self.in_order(results)
        return results[0][0] if self.forms.single else results[0]

    def restore(self, results: Sequence[torch.Tensor]) -> Any:
        """Give the results [b, C, H, W] of every part the form of the input."""
        if not isinstance(self.forms, list):
            return self.forms.restore(results[0])
        images = self.in_order(results)
        return [form.restore(image.unsqueeze(0)) for form, image in zip(self.forms, images, strict=True)]

    def restore_each(self, results: Sequence[tuple[torch.Tensor, ...]], number: int) -> list[Any]:
        """The same for each of `number` results of every part."""
        return [self.restore([result[i] for result in results]) for i in range(number)]


def read_collection(images: Any, layout: str | None = None, name: str = "images") -> Collection:
    """See a batch, or a list or tuple of single images of any sizes, dtypes and layouts on one device, as parts.

    Raises as `read_images`, and ValueError for a batch in a list or several devices.
    """
    if not isinstance(images, (list, tuple)):
        batch = read_images(images, layout, name)
        return Collection([Part(batch.pixels, None)], batch.pixels.shape[0], batch)
    forms = [read_images(image, layout, f"{name}[{i}]") for i, image in enumerate(images)]
    for i, form in enumerate(forms):
        if not form.single:
            raise ValueError(
                f"{name}[{i}] has shape {tuple(images[i].shape)}; every entry of a list is one image, [3, H, W] or "
                "[H, W, 3]. Pass a batch as an array, or unbind it."
            )
        if form.pixels.device != forms[0].pixels.device:
            raise ValueError(
                f"{name}[{i}] is on {form.pixels.device}, {name}[0] on {forms[0].pixels.device}; expected one device."
            )
    groups: dict[Any, list[int]] = {}
    for i, form in enumerate(forms):
        pixels = form.pixels
        alone = i if pixels.shape[2] * pixels.shape[3] >= STACKED_PIXELS else -1
        groups.setdefault((pixels.shape, pixels.dtype, form.channels_last, alone), []).append(i)
    # A list never has one part without an index, so that `gather` knows it.
    parts = [Part(_stacked([forms[i] for i in index]), index) for index in groups.values()]
    return Collection(parts, len(forms), forms)


def _stacked(forms: list[ImageBatch]) -> torch.Tensor:
    """[b, 3, H, W] in the memory layout of the images; a view where there is one."""
    if len(forms) == 1:
        return forms[0].pixels
    if forms[0].channels_last:
        return torch.cat([form.pixels.permute(0, 2, 3, 1) for form in forms]).permute(0, 3, 1, 2)
    return torch.cat([form.pixels for form in forms])
