"""MacenkoNormalizer: torchstain's call style, as a module whose target travels in its state dict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ernet_fast.stain import operators, pipeline
from ernet_fast.stain.collection import Collection
from ernet_fast.stain.functional import normalize_collection, normalize_directly
from ernet_fast.stain.multi_target import fit_targets
from ernet_fast.stain.network_output import read_output
from ernet_fast.stain.options import PERCENTILES, Options, is_number
from ernet_fast.stain.result import DEFAULT_MAXIMA, DEFAULT_STAINS, MacenkoFit
from ernet_fast.stain.target_module import TargetModule
from ernet_fast.stain.torchstain_form import as_torchstain, check_compat, compat_of_backend, read_torchstain

SETTINGS = "settings"
_FITTED = torch.zeros(1, dtype=torch.int32, device="cpu")  # the status of every target; not to be written to


def _option(name: str) -> property:
    """An attribute of the normaliser that is one of its options, and is checked when set."""

    def get(self: MacenkoNormalizer) -> Any:
        return getattr(self.options, name)

    def set_(self: MacenkoNormalizer, value: Any) -> None:
        self.options = replace(self.options, **{name: value})

    return property(get, set_)


class MacenkoNormalizer(TargetModule):
    """Gives H&E images the stains of a target.

    ``normalizer.fit(target); images, H, E = normalizer.normalize(images)`` as with torchstain, but results keep the
    layout and dtype of the input, batches are taken whole, and tiles without tissue do not fail. ``normalizer(batch)``
    returns the normalised images alone, so it serves as a transform.

    The state dict holds the target and, as ``settings``, the Io, alpha, beta and percentile of the normaliser; loading
    adopts them, so that the loaded normaliser gives what the saved one gave. State dicts without ``settings`` (of
    versions before 0.2) leave them as they are.

    Args:
        Io: transmitted intensity, grey level of an empty slide.
        alpha: percentile of the angles, in percent.
        beta: least optical density of tissue.
        percentile: "linear" (torchstain's NumPy backend) or "nearest" (its torch backend).
        on_degenerate: "reference", "identity" or "raise", see `macenko_normalize`.
        range: the value that stands for 255 in floating-point images; 1 for images in [0, 1].
        layout: "CHW" or "HWC", needed only for shapes that fit both.
        compat: "torchstain" makes `fit`, `normalize` and `transform` follow that package's own conventions: torch
            tensors are [3, H, W], use the nearest percentile and come back as int32 [H, W, 3] (its torch backend);
            NumPy arrays are [H, W, 3], use the linear percentile and come back as uint8 (its NumPy backend). Integers
            of any width are taken. `forward` is not affected but for the percentile.
        output: what `forward` returns: "image", or torch.float32, bfloat16 or float16 for a network's input, see
            `macenko_normalize`.
        mean: of a network's input.
        std: of a network's input.
        backend: "torch" or "numpy", torchstain's own argument, which may also come first: the same as
            compat="torchstain", whichever of the two is named, as every call sees which kind of array it gets.

    Attributes:
        HERef: buffer [3, 2] float64, optical density of the target's haematoxylin and eosin; Macenko's published values
            before `fit`. Arrays may be assigned.
        maxCRef: buffer [2] float64, its 99th percentile concentrations.

    Raises:
        ValueError, TypeError: a parameter that makes no sense.
    """

    HERef: torch.Tensor
    maxCRef: torch.Tensor
    Io, alpha, beta, percentile = _option("Io"), _option("alpha"), _option("beta"), _option("percentile")
    on_degenerate, range, layout = _option("on_degenerate"), _option("range"), _option("layout")

    def __init__(
        self,
        Io: float | str = 240,
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
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(Io, str):
            backend, Io = Io, 240
        compat = compat_of_backend(compat, backend)
        self.options = Options(Io, alpha, beta, percentile, on_degenerate, range, layout)
        self.network = read_output(output, mean, std)
        check_compat(compat, percentile, range, layout)
        self.compat = compat
        self.register_buffer("HERef", torch.tensor(DEFAULT_STAINS, dtype=torch.float64))
        self.register_buffer("maxCRef", torch.tensor(DEFAULT_MAXIMA, dtype=torch.float64))

    @property
    def target(self) -> MacenkoFit:
        """The target as `macenko_normalize` takes it."""
        stain, maximum = self._buffers["HERef"], self._buffers["maxCRef"]  # as attributes they are looked for last
        assert stain is not None and maximum is not None
        status = _FITTED if stain.is_cpu else torch.zeros(1, dtype=torch.int32, device=stain.device)
        return MacenkoFit(stain.double().unsqueeze(0), maximum.double().unsqueeze(0), status)

    def fit(
        self,
        I: Any,  # noqa: E741
        *numbers: Any,
        targets: str | None = None,
        mask: Any = None,
        Io: float | None = None,
        alpha: float | None = None,
        beta: float | None = None,
    ) -> MacenkoNormalizer:
        """Take the stains of one image, or of several together, as target.

        Args:
            I: one RGB image (torchstain's name), or a batch or list of several.
            numbers: `Io`, `alpha` and `beta` in torchstain's order; or `targets` and `mask`.
            targets: how several images make one target: "concat" fits all their pixels together, "avg" takes the means
                of their stain matrices and of their maximal concentrations.
            mask: as in `macenko_fit`.
            Io: in place of the normaliser's, for this call, as torchstain takes it.
            alpha: the same.
            beta: the same.

        Raises:
            ValueError: several images without `targets`, or stains that cannot be estimated; the message says why.
        """
        if numbers and not is_number(numbers[0]):
            targets, mask = _named("fit", numbers, targets=targets, mask=mask).values()
            numbers = ()
        options = self._options_of(I, **_named("fit", numbers, Io=Io, alpha=alpha, beta=beta))
        if self.compat is not None:
            several = isinstance(I, (list, tuple))
            I = [read_torchstain(image) for image in I] if several else read_torchstain(I)  # noqa: E741
            options = replace(options, layout="CHW")
        fit = fit_targets(I, targets, mask, options)
        self.HERef, self.maxCRef = fit.stain_matrix[0], fit.max_concentration[0]
        return self

    def forward(
        self, images: Any, source: MacenkoFit | None = None, mask: Any = None, return_status: bool = False
    ) -> Any:
        """Normalised images, or a network's input; `source` and `mask` as in `macenko_normalize`.

        With `return_status` a pair of that and the status [B] int32 of the source fit.
        """
        options, target = self._options_of(images), self.target
        if source is None and mask is None and self.network is None and not return_status:
            done = normalize_directly(images, target, options)
            if done is not None:
                return done
        collection = pipeline.read(images, options)
        results, status = normalize_collection(collection, target, source, mask, options, self.network)
        out = collection.restore(results) if self.network is None else collection.as_tensors(results)
        return (out, status) if return_status else out

    def normalize(
        self,
        I: Any,  # noqa: E741
        *numbers: Any,
        stains: bool = True,
        source: MacenkoFit | None = None,
        mask: Any = None,
        Io: float | None = None,
        alpha: float | None = None,
        beta: float | None = None,
    ) -> tuple[Any, Any, Any]:
        """Normalised image(s), and the haematoxylin and eosin parts as images, or None for both if not `stains`.

        Each image is fitted once.

        Args:
            I: as `images` of `macenko_normalize`.
            numbers: `Io`, `alpha`, `beta` and `stains` in torchstain's order; or `stains`.
            stains: also return the images of the stains, drawn with the target's stains.
            source: as in `macenko_normalize`.
            mask: as in `macenko_normalize`.
            Io: in place of the normaliser's, for this call, as torchstain takes it.
            alpha: the same.
            beta: the same.

        Raises:
            TypeError, ValueError: as `macenko_normalize`; TypeError for `stains` that is no bool.
        """
        given: dict[str, Any] = {"Io": Io, "alpha": alpha, "beta": beta}
        last = {"stains": None if stains is True else stains}
        if numbers and isinstance(numbers[0], bool):
            wanted = _named("normalize", numbers, **last)["stains"]
        else:
            given = _named("normalize", numbers, **given, **last)
            wanted = given.pop("stains")
        wanted = True if wanted is None else wanted
        if not isinstance(wanted, bool):
            raise TypeError(f"stains is {wanted!r}; expected True or False.")
        options = self._options_of(I, **given)
        if self.compat is None:
            return self._three(pipeline.read(I, options), options, wanted, source, mask)
        options = replace(options, layout="CHW")
        results = self._three(pipeline.read(read_torchstain(I), options), options, wanted, source, mask)
        return as_torchstain(I, results)

    def _three(
        self, collection: Collection, options: Options, stains: bool, source: MacenkoFit | None, mask: Any
    ) -> tuple[Any, Any, Any]:
        if not stains:
            results, _ = normalize_collection(collection, self.target, source, mask, options, None)
            return collection.restore(results), None, None
        found = pipeline.sources(collection, source, mask, self.target, options)
        threes = []
        for part in collection.parts:
            ours, theirs = part.take_fit(found.usable), part.take_fit(found.reference)
            out, h, e = operators.reconstruct_stains(part.pixels, ours, theirs, options)
            if options.identity:
                out = pipeline.keep_degenerate(out, part.pixels, part.take(found.known.status))
            threes.append((out, h, e))
        images, haematoxylin, eosin = collection.restore_each(threes, 3)
        return images, haematoxylin, eosin

    def transform(self, I: Any, *numbers: Any, **options: Any) -> Any:  # noqa: E741
        """The normalised image(s) of `normalize` alone; its arguments but for `stains`."""
        return self.normalize(I, *numbers, stains=False, **options)[0]

    def fit_transform(self, I: Any, *numbers: Any, **options: Any) -> Any:  # noqa: E741
        """`fit` and then `transform` of one image, with the same Io, alpha and beta."""
        return self.fit(I, *numbers, **options).transform(I, *numbers, **options)

    @property
    def settings(self) -> torch.Tensor:
        """[4] float64: Io, alpha, beta, and 1 for the nearest percentile; in the state dict."""
        o = self.options
        return torch.tensor([o.Io, o.alpha, o.beta, o.nearest], dtype=torch.float64, device="cpu")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + SETTINGS] = self.settings

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        key = prefix + SETTINGS
        super()._load_from_state_dict(
            {name: value for name, value in state_dict.items() if name != key}, prefix, *arguments
        )
        if key not in state_dict:
            return
        try:
            Io, alpha, beta, nearest = state_dict[key].tolist()
            percentile = PERCENTILES[int(nearest)]
            self.options = replace(self.options, Io=Io, alpha=alpha, beta=beta, percentile=percentile)
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            arguments[-1].append(f"{key} holds no settings of a MacenkoNormalizer: {error}")

    def extra_repr(self) -> str:
        """Parameters, as torch shows them."""
        return (
            f"Io={self.Io:g}, alpha={self.alpha:g}, beta={self.beta:g}, percentile={self.percentile!r}, "
            f"on_degenerate={self.on_degenerate!r}" + (f", compat={self.compat!r}" if self.compat else "")
        )

    def _options_of(self, images: Any, **given: float | None) -> Options:
        """The options for these images, with what is given for one call."""
        if self.compat is None and not given:
            return self.options
        changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        first = images[0] if isinstance(images, (list, tuple)) and images else images
        if self.compat is not None and isinstance(first, torch.Tensor):
            changed["percentile"] = "nearest"
        return replace(self.options, **changed) if changed else self.options


def _named(call: str, values: tuple[Any, ...], **found: Any) -> dict[str, Any]:
    """Arguments by name, of which `values` came by position; TypeError for too many, or one given twice."""
    if len(values) > len(found):
        raise TypeError(f"{call} takes at most {len(found)} numbers after the image ({', '.join(found)}).")
    for name, value in zip(list(found), values, strict=False):
        if found[name] is not None:
            raise TypeError(f"{call} got {name} both by position and by name.")
        found[name] = value
    return found
