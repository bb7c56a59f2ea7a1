"""MacenkoNormalizer: torchstain's call style, as a module whose target travels in its state dict."""

from __future__ import annotations

from typing import Any

import torch

from ernet_fast.stain import _ops
from ernet_fast.stain.functional import (
    check_range,
    check_target,
    keep_degenerate,
    macenko_fit,
    macenko_normalize,
    on_device,
    usable_source,
)
from ernet_fast.stain.layout import read_images
from ernet_fast.stain.parameters import check_parameters, check_policy
from ernet_fast.stain.result import MacenkoFit, describe_failures

DEFAULT_STAINS = ((0.5626, 0.2159), (0.7201, 0.8012), (0.4062, 0.5581))
DEFAULT_MAXIMA = (1.9705, 1.0308)


class MacenkoNormalizer(torch.nn.Module):
    """Gives H&E images the stains of a target.

    ``normalizer.fit(target); images, H, E = normalizer.normalize(images)`` as with torchstain, but results keep the
    layout and dtype of the input, batches are taken whole, and tiles without tissue do not fail. ``normalizer(batch)``
    returns the normalised images alone, so it serves as a transform.

    Args:
        Io: transmitted light, grey level of an empty slide.
        alpha: percentile of the angles, in percent.
        beta: least optical density of tissue.
        percentile: "linear" (torchstain's NumPy backend) or "nearest" (its torch backend).
        on_degenerate: "reference", "identity" or "raise", see `macenko_normalize`.
        range: the value that stands for 255 in floating-point images; 1 for images in [0, 1].
        layout: "CHW" or "HWC", needed only for shapes that fit both.

    Attributes:
        HERef: buffer [3, 2] float64, optical density of the target's haematoxylin and eosin; Macenko's published values
            before `fit`.
        maxCRef: buffer [2] float64, its 99th percentile concentrations.

    Raises:
        ValueError, TypeError: a parameter that makes no sense.
    """

    HERef: torch.Tensor
    maxCRef: torch.Tensor

    def __init__(
        self,
        Io: float = 240,
        alpha: float = 1,
        beta: float = 0.15,
        percentile: str = "linear",
        on_degenerate: str = "reference",
        range: float = 255,
        layout: str | None = None,
    ) -> None:
        super().__init__()
        check_parameters(Io, alpha, beta, percentile)
        check_policy(on_degenerate)
        self.Io, self.alpha, self.beta = Io, alpha, beta
        self.percentile, self.on_degenerate = percentile, on_degenerate
        self.range, self.layout = range, layout
        self.register_buffer("HERef", torch.tensor(DEFAULT_STAINS, dtype=torch.float64))
        self.register_buffer("maxCRef", torch.tensor(DEFAULT_MAXIMA, dtype=torch.float64))

    @property
    def target(self) -> MacenkoFit:
        """The target as `macenko_normalize` takes it."""
        status = torch.zeros(1, dtype=torch.int32, device=self.HERef.device)
        return MacenkoFit(self.HERef.double().unsqueeze(0), self.maxCRef.double().unsqueeze(0), status)

    def fit(self, I: Any) -> MacenkoNormalizer:  # noqa: E741  (torchstain's name)
        """Take the stains of one image as target.

        Args:
            I: one RGB image, or a batch of one.

        Raises:
            ValueError: several images, or one whose stains cannot be estimated; the message says why.
        """
        fit = macenko_fit(I, **self._fit_options())
        if len(fit.status) != 1:
            raise ValueError(f"fit takes one target image; got {len(fit.status)}.")
        failures = describe_failures(fit.status)
        if failures:
            raise ValueError(
                f"the target cannot be fitted ({failures}). Choose a target image with tissue of both stains."
            )
        self.HERef = fit.stain_matrix[0].to(self.HERef)
        self.maxCRef = fit.max_concentration[0].to(self.maxCRef)
        return self

    def forward(self, images: Any) -> Any:
        """Normalised images, of the input's layout and dtype."""
        return macenko_normalize(images, self.target, on_degenerate=self.on_degenerate, **self._fit_options())

    def normalize(self, I: Any, stains: bool = True) -> tuple[Any, Any, Any]:  # noqa: E741
        """Normalised image(s), and the haematoxylin and eosin parts as images, or None for both if not `stains`.

        Raises:
            ValueError: as `macenko_normalize`.
        """
        if not stains:
            return self(I), None, None
        batch = read_images(I, self.layout)
        check_range(batch.pixels, self.range)
        target = self.target
        check_target(target)
        numbers = float(self.Io), float(self.alpha), float(self.beta), self.percentile == "nearest"
        source = _ops.fit(batch.pixels, *numbers, float(self.range))
        if self.on_degenerate == "raise" and (failures := describe_failures(source.status)):
            raise ValueError(f"these images cannot be normalised: {failures}.")
        target = on_device(target, batch.pixels.device)
        known = usable_source(source, target)
        # One stain alone: the other's concentration is multiplied by nothing.
        results = [
            _ops.reconstruct(
                batch.pixels,
                known,
                target._replace(max_concentration=target.max_concentration * target.max_concentration.new_tensor(kept)),
                float(self.Io),
                float(self.range),
            )
            for kept in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0))
        ]
        if self.on_degenerate == "identity":
            results[0] = keep_degenerate(results[0], batch.pixels, source.status)
        image, haematoxylin, eosin = (batch.restore(result) for result in results)
        return image, haematoxylin, eosin

    def extra_repr(self) -> str:
        """Parameters, as torch shows them."""
        return (
            f"Io={self.Io}, alpha={self.alpha}, beta={self.beta}, percentile={self.percentile!r}, "
            f"on_degenerate={self.on_degenerate!r}"
        )

    def _fit_options(self) -> dict[str, Any]:
        return {
            "Io": self.Io,
            "alpha": self.alpha,
            "beta": self.beta,
            "percentile": self.percentile,
            "range": self.range,
            "layout": self.layout,
        }
