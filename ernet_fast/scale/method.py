"""The methods by one interface: images, and the stains they have if these are known, to images and stains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ernet_fast.stain import (
    MacenkoFit,
    MacenkoStatus,
    ReinhardFit,
    operators,
    pipeline,
    reinhard_fit,
    reinhard_normalize,
)
from ernet_fast.stain.joined_fit import macenko_fit_together, reinhard_fit_together
from ernet_fast.stain.options import Options
from ernet_fast.stain.result import expand_fit
from ernet_fast.stain.tissue import Tissue

Values = tuple[float, ...]
"""Stains of an image as plain numbers, in the order of the method's `columns`; empty for none."""


class Method(ABC):
    """Gives images the stains of its target.

    Attributes:
        name: as on the command line.
        columns: what the numbers of a fit are.
        options: constants, and `on_degenerate`.
        tissue: which pixels are tissue.
    """

    name: str
    columns: tuple[str, ...]

    def __init__(self, options: Options) -> None:
        self.options = options
        # what is not to be written is found out by its status, one image at a time
        policy = "identity" if options.on_degenerate == "raise" else options.on_degenerate
        self.working = replace(options, on_degenerate=policy, range=255, layout="HWC")
        self.tissue = Tissue(options.Io, options.beta)

    @abstractmethod
    def normalize(
        self, images: Sequence[torch.Tensor], source: Values | None = None
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Normalised images, their stains [B, columns] float64 and statuses [B] int32, on the device of the images.

        Args:
            images: uint8 [H, W, 3] each.
            source: the stains they have, if these are known: () for stains that could not be fitted.
        """

    @abstractmethod
    def fit_together(self, images: Iterable[np.ndarray]) -> tuple[Values, MacenkoStatus]:
        """The stains of many images uint8 [H, W, 3] together."""

    @property
    @abstractmethod
    def target_values(self) -> dict[str, Any]:
        """The target as plain numbers, under the names of the normaliser's buffers."""


class MacenkoMethod(Method):
    """Macenko normalisation to the stains of a target (B = 1)."""

    name = "macenko"
    columns = (
        *(f"haematoxylin_{c}" for c in "rgb"), *(f"eosin_{c}" for c in "rgb"), "max_haematoxylin", "max_eosin",
    )  # fmt: skip

    def __init__(self, target: MacenkoFit, options: Options) -> None:
        super().__init__(options)
        pipeline.check_target(target)
        self.target = expand_fit(target, 1, "target")

    def normalize(
        self, images: Sequence[torch.Tensor], source: Values | None = None
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """As `Method.normalize`, with the pixels of `macenko_normalize`."""
        if len(images) == 1:  # needs no collection
            out, fit = self._part(images[0].permute(2, 0, 1).unsqueeze(0), source)
            return [out[0].permute(1, 2, 0)], _values(fit), fit.status
        collection = pipeline.read(list(images), self.working)
        done = [self._part(part.pixels, source) for part in collection.parts]
        fit = collection.gather_fit([fit for _, fit in done])
        return collection.restore([out for out, _ in done]), _values(fit), fit.status

    def _part(self, pixels: torch.Tensor, source: Values | None) -> tuple[torch.Tensor, MacenkoFit]:
        """Images [b, 3, H, W] of one shape, in one operator where stains are to be fitted and there is one."""
        done = None if source is not None else operators.normalize(pixels, self.target, self.working)
        return self._apart(pixels, source) if done is None else done

    def _apart(self, pixels: torch.Tensor, source: Values | None) -> tuple[torch.Tensor, MacenkoFit]:
        """Images [b, 3, H, W] reconstructed from their stains, which are fitted first if they are not known."""
        if source is None:
            fit = operators.fit(pixels, self.working)
        else:
            fit = expand_fit(_macenko_fit(source), len(pixels), "source")
        fit, target = pipeline.on_device(fit, pixels.device), pipeline.on_device(self.target, pixels.device)
        usable = pipeline.usable_source(fit, expand_fit(target, len(pixels), "target"))
        out = operators.reconstruct(pixels, usable, target, self.working)
        return (pipeline.keep_degenerate(out, pixels, fit.status) if self.working.identity else out), fit

    def fit_together(self, images: Iterable[np.ndarray]) -> tuple[Values, MacenkoStatus]:
        """The exact stains of the image that holds all their pixels, in 384 MiB whatever their number."""
        fit = macenko_fit_together(images, self.working)
        return values_of(fit), MacenkoStatus(int(fit.status[0]))

    @property
    def target_values(self) -> dict[str, Any]:
        """HERef and maxCRef."""
        return {"HERef": self.target.stain_matrix[0].tolist(), "maxCRef": self.target.max_concentration[0].tolist()}


class ReinhardMethod(Method):
    """Reinhard normalisation to the colour statistics of a target (B = 1)."""

    name = "reinhard"
    columns = ("mean_l", "mean_a", "mean_b", "std_l", "std_a", "std_b")

    def __init__(self, target: ReinhardFit, options: Options) -> None:
        super().__init__(options)
        self.target = target

    def normalize(
        self, images: Sequence[torch.Tensor], source: Values | None = None
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """As `Method.normalize`, with the pixels of `reinhard_normalize`."""
        pictures = list(images)
        fit = reinhard_fit(pictures, layout="HWC") if source is None else _reinhard_fit(source, len(pictures))
        policy = self.working.on_degenerate
        out, status = reinhard_normalize(
            pictures, self.target, fit, on_degenerate=policy, layout="HWC", return_status=True
        )
        return out, torch.cat([fit.mean, fit.std], dim=1), status

    def fit_together(self, images: Iterable[np.ndarray]) -> tuple[Values, MacenkoStatus]:
        """Means and standard deviations over all pixels, from those of each image."""
        fit = reinhard_fit_together(images)
        return values_of(fit), MacenkoStatus(int(fit.status[0]))

    @property
    def target_values(self) -> dict[str, Any]:
        """target_means and target_stds."""
        return {"target_means": self.target.mean[0].tolist(), "target_stds": self.target.std[0].tolist()}


def values_of(fit: MacenkoFit | ReinhardFit) -> Values:
    """The fit of one image as plain numbers; empty if it failed."""
    if int(fit.status[0]) != MacenkoStatus.OK:
        return ()
    if isinstance(fit, ReinhardFit):
        return (*fit.mean[0].tolist(), *fit.std[0].tolist())
    return (*fit.stain_matrix[0].T.flatten().tolist(), *fit.max_concentration[0].tolist())


def _values(fit: MacenkoFit) -> torch.Tensor:
    """The numbers of each image's fit [B, columns]."""
    return torch.cat([fit.stain_matrix.transpose(1, 2).flatten(1), fit.max_concentration], dim=1)


def _macenko_fit(values: Values) -> MacenkoFit:
    """The fit of one image that `values_of` gave."""
    numbers = torch.tensor(values or [float("nan")] * 8, dtype=torch.float64)
    status = MacenkoStatus.OK if values else MacenkoStatus.TOO_FEW_TISSUE_PIXELS
    return MacenkoFit(numbers[:6].reshape(1, 2, 3).transpose(1, 2), numbers[6:][None], torch.tensor([int(status)]))


def _reinhard_fit(values: Values, count: int) -> ReinhardFit:
    numbers = torch.tensor(values or [float("nan")] * 6, dtype=torch.float64)
    status = MacenkoStatus.OK if values else MacenkoStatus.TOO_FEW_TISSUE_PIXELS
    rows = numbers.expand(count, 6)
    return ReinhardFit(rows[:, :3], rows[:, 3:], torch.full((count,), int(status), dtype=torch.int32))
