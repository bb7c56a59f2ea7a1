"""MacenkoNormalizer: torchstain's call style, as a module whose target travels in its state dict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ernet_fast.stain import operators
from ernet_fast.stain.collection import read_collection
from ernet_fast.stain.functional import (
    check_range,
    check_target,
    keep_degenerate,
    known_source,
    macenko_normalize,
    on_device,
    refuse_failures,
    usable_source,
)
from ernet_fast.stain.multi_target import fit_targets
from ernet_fast.stain.network_output import read_output
from ernet_fast.stain.options import check_parameters, check_policy
from ernet_fast.stain.published import DEFAULT_MAXIMA, DEFAULT_STAINS
from ernet_fast.stain.result import MacenkoFit, expand_fit
from ernet_fast.stain.separate import one_stain
from ernet_fast.stain.torchstain_form import as_torchstain, check_compat, read_as_torchstain


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
        compat: "torchstain" makes `fit` and `normalize` follow that package's own conventions: torch tensors are
            [3, H, W], use the nearest percentile and come back as int32 [H, W, 3] (its torch backend); NumPy arrays
            are [H, W, 3], use the linear percentile and come back as uint8 (its NumPy backend). `forward` is not
            affected but for the percentile.
        output: what `forward` returns: "image", or torch.float32, bfloat16 or float16 for a network's input, see
            `macenko_normalize`.
        mean: of a network's input.
        std: of a network's input.

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
        compat: str | None = None,
        output: str | torch.dtype = "image",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_parameters(Io, alpha, beta, percentile)
        check_policy(on_degenerate)
        read_output(output, mean, std)
        check_compat(compat, percentile, range, layout)
        self.Io, self.alpha, self.beta = Io, alpha, beta
        self.percentile, self.on_degenerate = percentile, on_degenerate
        self.range, self.layout, self.compat = range, layout, compat
        self.output = output
        self.mean, self.std = (None if values is None else tuple(map(float, values)) for values in (mean, std))
        self.register_buffer("HERef", torch.tensor(DEFAULT_STAINS, dtype=torch.float64))
        self.register_buffer("maxCRef", torch.tensor(DEFAULT_MAXIMA, dtype=torch.float64))

    @property
    def target(self) -> MacenkoFit:
        """The target as `macenko_normalize` takes it."""
        stain = self.HERef
        status = torch.zeros(1, dtype=torch.int32, device=stain.device)
        return MacenkoFit(stain.double().unsqueeze(0), self.maxCRef.double().unsqueeze(0), status)

    def fit(
        self,
        I: Any,  # noqa: E741
        targets: str | None = None,
        mask: Any = None,
        *,
        Io: float | None = None,
        alpha: float | None = None,
        beta: float | None = None,
    ) -> MacenkoNormalizer:
        """Take the stains of one image, or of several together, as target.

        Args:
            I: one RGB image (torchstain's name), or a batch or list of several.
            targets: how several images make one target: "concat" fits all their pixels together, "avg" takes the means
                of their stain matrices and of their maximal concentrations.
            mask: as in `macenko_fit`.
            Io: in place of the normaliser's, for this call, as torchstain takes it.
            alpha: the same.
            beta: the same.

        Raises:
            ValueError: several images without `targets`, or stains that cannot be estimated; the message says why.
        """
        if self.compat is not None:
            for image in I if isinstance(I, (list, tuple)) else [I]:
                read_as_torchstain(image)
        fit = fit_targets(I, targets, mask, **self._options_with(I, Io=Io, alpha=alpha, beta=beta))
        self.HERef = fit.stain_matrix[0].to(self.HERef)
        self.maxCRef = fit.max_concentration[0].to(self.maxCRef)
        return self

    def forward(self, images: Any, source: MacenkoFit | None = None, mask: Any = None) -> Any:
        """Normalised images, or a network's input; `source` and `mask` as in `macenko_normalize`."""
        output = {"output": self.output, "mean": self.mean, "std": self.std}
        return self._normalized(images, source, mask, **self._fit_options(images), **output)

    def _normalized(self, images: Any, source: MacenkoFit | None, mask: Any, **options: Any) -> Any:
        return macenko_normalize(images, self.target, source, on_degenerate=self.on_degenerate, mask=mask, **options)

    def normalize(
        self,
        I: Any,  # noqa: E741
        stains: bool = True,
        *,
        source: MacenkoFit | None = None,
        mask: Any = None,
        Io: float | None = None,
        alpha: float | None = None,
        beta: float | None = None,
    ) -> tuple[Any, Any, Any]:
        """Normalised image(s), and the haematoxylin and eosin parts as images, or None for both if not `stains`.

        Args:
            I: as `images` of `macenko_normalize`.
            stains: also return the images of the stains, drawn with the target's stains.
            source: as in `macenko_normalize`.
            mask: as in `macenko_normalize`.
            Io: in place of the normaliser's, for this call, as torchstain takes it.
            alpha: the same.
            beta: the same.

        Raises:
            TypeError, ValueError: as `macenko_normalize`; TypeError for `stains` that is no bool.
        """
        if not isinstance(stains, bool):
            raise TypeError(f"stains is {stains!r}; expected True or False. Give Io, alpha and beta by name.")
        if self.compat is not None:
            read_as_torchstain(I)
        options = self._options_with(I, Io=Io, alpha=alpha, beta=beta)
        results = (
            self._image_and_stains(I, source, mask, **options)
            if stains
            else (self._normalized(I, source, mask, **options), None, None)
        )
        return results if self.compat is None else as_torchstain(results)

    def _image_and_stains(
        self, images: Any, source: MacenkoFit | None, mask: Any, layout: str | None, Io: float, **options: Any
    ) -> tuple[Any, Any, Any]:
        collection = read_collection(images, layout)
        check_range(collection, self.range)
        check_target(self.target)
        known = known_source(collection, source, mask, Io, **options)
        refuse_failures(known.status, self.on_degenerate)
        target = on_device(expand_fit(self.target, collection.count, "target"), collection.device)
        usable = usable_source(known, target)
        results: tuple[list[torch.Tensor], ...] = ([], [], [])
        for part in collection.parts:
            ours, theirs = part.take_fit(usable), part.take_fit(target)
            for kept, result in zip(((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)), results, strict=True):
                drawn = one_stain(theirs, kept)
                result.append(operators.reconstruct(part.pixels, ours, drawn, float(Io), float(self.range)))
            if self.on_degenerate == "identity":
                results[0][-1] = keep_degenerate(results[0][-1], part.pixels, part.take(known.status))
        image, haematoxylin, eosin = (collection.restore(result) for result in results)
        return image, haematoxylin, eosin

    def extra_repr(self) -> str:
        """Parameters, as torch shows them."""
        return (
            f"Io={self.Io}, alpha={self.alpha}, beta={self.beta}, percentile={self.percentile!r}, "
            f"on_degenerate={self.on_degenerate!r}" + (f", compat={self.compat!r}" if self.compat else "")
        )

    def _options_with(self, images: Any, **given: float | None) -> dict[str, Any]:
        """`_fit_options` with what is given for one call."""
        options = self._fit_options(images)
        options |= {name: value for name, value in given.items() if value is not None}
        check_parameters(*(options[name] for name in ("Io", "alpha", "beta", "percentile")))
        return options

    def _fit_options(self, images: Any) -> dict[str, Any]:
        first = images[0] if isinstance(images, (list, tuple)) and images else images
        nearest = self.compat is not None and isinstance(first, torch.Tensor)
        return {
            "Io": self.Io,
            "alpha": self.alpha,
            "beta": self.beta,
            "percentile": "nearest" if nearest else self.percentile,
            "range": self.range,
            "layout": self.layout,
        }
