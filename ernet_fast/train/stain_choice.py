"""Which stains a run normalises to, and the normaliser that training, evaluation and the checkpoint share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ernet_fast.data import Sample, read_image
from ernet_fast.stain import (
    ColourCounts,
    MacenkoFit,
    MacenkoNormalizer,
    MacenkoStatus,
    ReinhardFit,
    ReinhardNormalizer,
    StainNormalize,
    macenko_fit,
)
from ernet_fast.stain.joined_fit import reinhard_fit_together
from ernet_fast.train.images import SlideAware, evenly_chosen

CANDIDATES = 64
"""Images looked at for the most typical stains."""


class StainNormalization(StainNormalize):
    """`StainNormalize` of uint8 [3, H, W] images that knows where its target came from, and its state.

    An image without stains to fit (background) is taken to have the target's (``on_degenerate="reference"``).
    """

    method = "macenko"
    normalizer: Any

    def __init__(self, normalizer: MacenkoNormalizer | ReinhardNormalizer, source: str) -> None:
        super().__init__(normalizer)
        self.source = source

    def state(self) -> dict[str, Any]:
        """For the checkpoint: method, where the target came from, and the normaliser's tensors."""
        return {"method": self.method, "source": self.source, "normalizer": self.normalizer.state_dict()}

    def same_target(self, other: StainNormalization) -> bool:
        """Whether both lead to the same stains, to the last bit."""
        own, theirs = self.normalizer.state_dict(), other.normalizer.state_dict()
        return own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)

    def fit_together(self, images: Iterable[Tensor]) -> MacenkoFit | ReinhardFit:
        """What `of_source` takes: stains of all images uint8 [3, H, W] together, or the target's if they have none."""
        fit = _fit_together(images)
        return fit if int(fit.status[0]) == MacenkoStatus.OK else self.normalizer.target

    def of_source(self, image: Tensor, source: MacenkoFit | ReinhardFit) -> Tensor:
        """The normalised image, uint8 [3, H, W], whose stains are `source`."""
        with torch.no_grad():
            result: Tensor = self.normalizer(image, source)
        return result

    def by_slide(self) -> SlideNormalization:
        """The same target, with the stains of an image fitted on its whole slide."""
        return SlideNormalization(self.normalizer, self.source)

    @classmethod
    def from_state(cls, state: dict[str, Any] | None) -> StainNormalization | None:
        """The inverse of `state`; None for a run without normalisation. Raises ValueError for another method."""
        if state is None:
            return None
        if state.get("method") == ReinhardNormalization.method:
            reinhard = ReinhardNormalizer(layout="CHW")
            reinhard.load_state_dict(state["normalizer"])
            return ReinhardNormalization(reinhard, state["source"])
        if state.get("method") != "macenko":
            raise ValueError(
                f"the checkpoint's stain normalisation is {state.get('method')!r}; expected 'macenko' or 'reinhard'."
            )
        normalizer = MacenkoNormalizer(layout="CHW")
        normalizer.load_state_dict(state["normalizer"])
        if "slides" not in state:
            return StainNormalization(normalizer, state["source"])
        slides = {slide: MacenkoFit(*fit) for slide, fit in state["slides"].items()}
        return SlideNormalization(normalizer, state["source"], slides)


class ReinhardNormalization(StainNormalization):
    """Normalisation of each image's colour statistics to those of the target (Reinhard et al., 2001)."""

    method = "reinhard"

    def fit_together(self, images: Iterable[Tensor]) -> ReinhardFit:
        """Colour statistics of all images uint8 [3, H, W] together."""
        return reinhard_fit_together(image.permute(1, 2, 0).numpy() for image in images)


class SlideNormalization(StainNormalization, SlideAware):
    """Normalisation of an image by the stains of all images of its slide, which are fitted together, once.

    Fits are kept in `slides` and in the checkpoint: a slide that is known is not fitted again. A slide without stains
    to fit is taken to have the target's.
    """

    def __init__(self, normalizer: MacenkoNormalizer, source: str, slides: dict[str, MacenkoFit] | None = None) -> None:
        super().__init__(normalizer, source)
        self.slides = dict(slides or {})

    def state(self) -> dict[str, Any]:
        """As without slides, and the fits."""
        return super().state() | {"slides": {slide: list(fit) for slide, fit in sorted(self.slides.items())}}

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Fit the slides of `samples` that are not known yet, on all of their images among `samples`."""
        paths: dict[str, list[Path]] = {}
        for sample in samples:
            if sample.slide not in self.slides:
                paths.setdefault(sample.slide, []).append(sample.path)
        for slide, images in sorted(paths.items()):
            fit, target = _fit_together(map(read_image, sorted(images))), self.normalizer.target
            fitted = int(fit.status[0]) == MacenkoStatus.OK
            self.slides[slide] = fit if fitted else target._replace(status=fit.status)

    def of_slide(self, image: Tensor, sample: Sample) -> Tensor:
        """The normalised image, uint8 [3, H, W]; KeyError if its slide is not prepared."""
        fit = self.slides[sample.slide]
        return self.of_source(image, fit if int(fit.status[0]) == MacenkoStatus.OK else self.normalizer.target)


def _fit_together(images: Iterable[Tensor]) -> MacenkoFit:
    counts = ColourCounts()
    for image in images:
        counts.add(image, layout="CHW")
    return counts.fit()


def plain_state(stain: StainNormalization | None) -> dict[str, Any] | None:
    """`StainNormalization.state` as numbers and lists, for JSON; numbers keep all bits."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    return None if stain is None else plain(stain.state())


def read_state(values: Any) -> Any:
    """The inverse of `plain_state`."""
    if isinstance(values, dict):
        if values.keys() == {"dtype", "values"}:
            return torch.tensor(values["values"], dtype=getattr(torch, values["dtype"]))
        return {key: read_state(item) for key, item in values.items()}
    return [read_state(item) for item in values] if isinstance(values, list) else values


def fit_to_image(path: str | os.PathLike[str]) -> StainNormalization:
    """Normalise to the stains of one image. Raises ValueError if it has none to fit."""
    fit = macenko_fit(read_image(path), layout="CHW")
    status = MacenkoStatus(int(fit.status[0]))
    if status != MacenkoStatus.OK:
        raise ValueError(
            f"the stain target {os.fspath(path)!r} cannot be fitted: {status.reason}. Choose an image with tissue."
        )
    return _to_target(fit, path)


def normalise_to(method: str, path: str | os.PathLike[str]) -> StainNormalization:
    """Normalisation by "macenko" or "reinhard" to one image. Raises ValueError if it cannot be fitted."""
    if method == ReinhardNormalization.method:
        return ReinhardNormalization(ReinhardNormalizer(layout="CHW").fit(read_image(path)), Path(path).name)
    return fit_to_image(path)


def most_typical(samples: Sequence[Sample]) -> tuple[Path, StainNormalization]:
    """The image whose stains lie nearest to the median of the set, and the normalisation to it, whatever the order.

    Up to 64 images, evenly chosen, are fitted; the eight numbers of a fit (two stain vectors, two maximal
    concentrations) are compared with their medians, in units of the median absolute deviation. The least sum of
    squares wins.

    Raises:
        ValueError: no image can be fitted.
    """
    chosen = evenly_chosen(samples, CANDIDATES)
    found = [(macenko_fit(read_image(sample.path), layout="CHW"), sample.path) for sample in chosen]
    fitted = [(fit, path) for fit, path in found if int(fit.status[0]) == MacenkoStatus.OK]
    if not fitted:
        raise ValueError(
            f"none of {len(chosen)} training images has stains to fit (all are background?). Name a target with "
            "--stain-target, or train with --stain none."
        )
    numbers = [torch.cat([fit.stain_matrix[0].flatten(), fit.max_concentration[0]]) for fit, _ in fitted]
    table = torch.stack(numbers).double().cpu()
    deviation = table - table.quantile(0.5, dim=0)
    spread = deviation.abs().quantile(0.5, dim=0).clamp_min(1e-6)
    fit, path = fitted[int(((deviation / spread) ** 2).sum(dim=1).argmin())]
    return path, _to_target(fit, path)


def _to_target(fit: MacenkoFit, path: str | os.PathLike[str]) -> StainNormalization:
    normalizer = MacenkoNormalizer(layout="CHW")
    normalizer.HERef, normalizer.maxCRef = fit.stain_matrix[0], fit.max_concentration[0]
    return StainNormalization(normalizer, Path(path).name)
