"""Reading what images are to look like, or what they look like already: an image, saved stains, the published ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ernet_fast._optional import require
from ernet_fast.data import read_image
from ernet_fast.scale.method import MacenkoMethod, Method, ReinhardMethod
from ernet_fast.stain import MacenkoFit, MacenkoNormalizer, ReinhardFit, ReinhardNormalizer
from ernet_fast.stain.options import Options

PUBLISHED = "published"
METHODS = ("macenko", "reinhard")
SAVED = (".safetensors", ".pt")
"""Suffixes of files with the state dict of a normaliser."""

CONSTANTS = ("Io", "alpha", "beta", "percentile")


class Stains(NamedTuple):
    """A fit of one image (B = 1), and the constants it was made with if they are known."""

    fit: MacenkoFit | ReinhardFit
    constants: Options | None


def read_stains(source: str | os.PathLike[str] | MacenkoFit | ReinhardFit, method: str, options: Options) -> Stains:
    """The stains of an image file, of a file with the state dict of a normaliser, or the published ones.

    Args:
        source: path of an image, which is fitted with `options`; of a .safetensors or .pt file with the state dict of a
            `MacenkoNormalizer` or `ReinhardNormalizer`; "published"; or a fit.
        method: "macenko" or "reinhard".
        options: constants of the method.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an image without stains to fit, a file of another method or without stains, "published" with
            Reinhard's method, which has no published target.
    """
    normalizer = _normalizer(method, options)
    if isinstance(source, tuple):
        return _given(source, method)
    if source == PUBLISHED:
        if method != "macenko":
            raise ValueError(f"no target is published for the method {method!r}; give an image or saved stains.")
        return Stains(normalizer.target, None)
    constants = None
    if Path(source).suffix.lower() in SAVED:
        constants = _load(normalizer, Path(source), method)
    else:
        try:
            normalizer.fit(read_image(source))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    return Stains(_fit_of(normalizer), constants)


def saved_constants(source: Any) -> Options | None:
    """The constants (Io, alpha, beta, percentile) in a file of saved stains; None where there are none."""
    if not isinstance(source, (str, os.PathLike)) or Path(source).suffix.lower() not in SAVED:
        return None
    settings = _read_state(Path(source)).get("settings")
    if settings is None:
        return None
    normalizer = MacenkoNormalizer()
    normalizer.load_state_dict({**normalizer.state_dict(), "settings": settings})
    return normalizer.options


def make_method(target: Any, method: str = "macenko", options: Options | None = None) -> Method:
    """The method with its target read, see `read_stains`.

    Without `options` the constants are those saved with the target, or the usual ones.

    Raises:
        ValueError: an unknown method, or `options` that are not those the target was saved with; and as `read_stains`.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}; expected one of {', '.join(map(repr, METHODS))}.")
    saved = saved_constants(target) if method == "macenko" else None
    options = options or saved or Options()
    check_constants(saved, options, "target", target)
    fit = read_stains(target, method, options).fit
    return MacenkoMethod(fit, options) if isinstance(fit, MacenkoFit) else ReinhardMethod(fit, options)


def check_constants(saved: Options | None, options: Options, name: str, source: Any) -> None:
    """Raise ValueError if stains were saved with other constants than those that images are normalised with."""
    for constant in CONSTANTS if saved is not None else ():
        before, now = getattr(saved, constant), getattr(options, constant)
        if before != now:
            raise ValueError(
                f"the {name} {str(source)!r} was fitted with {constant}={before!r}, but {constant}={now!r} is asked "
                f"for. Leave {constant} out to use the saved one, or fit the {name} again."
            )


def _normalizer(method: str, options: Options) -> Any:
    if method == "reinhard":
        return ReinhardNormalizer(layout="CHW")
    return MacenkoNormalizer(layout="CHW", **{name: getattr(options, name) for name in CONSTANTS})


def _fit_of(normalizer: Any) -> MacenkoFit | ReinhardFit:
    if isinstance(normalizer, MacenkoNormalizer):
        return normalizer.target
    status = torch.zeros(1, dtype=torch.int32)
    return ReinhardFit(normalizer.target_means.double()[None], normalizer.target_stds.double()[None], status)


def _given(fit: Any, method: str) -> Stains:
    kind = MacenkoFit if method == "macenko" else ReinhardFit
    if not isinstance(fit, kind):
        raise TypeError(f"a {type(fit).__name__} was given for the method {method!r}; expected a {kind.__name__}.")
    if len(fit.status) != 1 or int(fit.status[0]) != 0:
        raise ValueError(f"stains of {len(fit.status)} images, of status {fit.status.tolist()}; expected one, fitted.")
    return Stains(fit, None)


def _load(normalizer: Any, path: Path, method: str) -> Options | None:
    state = _read_state(path)
    missing = [name for name in normalizer.state_dict() if name not in state and name != "settings"]
    if missing:
        raise ValueError(
            f"{str(path)!r} holds {', '.join(sorted(state)) or 'nothing'}; the method {method!r} needs "
            f"{', '.join(missing)}: the state dict of its normaliser."
        )
    try:
        normalizer.load_state_dict({name: value for name, value in state.items() if name in {*normalizer.state_dict()}})
    except RuntimeError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error
    fit = _fit_of(normalizer)
    if not all(bool(part.isfinite().all()) for part in fit[:2]):
        raise ValueError(f"the stains in {str(path)!r} are not finite: the normaliser was saved before it was fitted.")
    return normalizer.options if "settings" in state else None


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no file of saved stains at {str(path)!r}.")
    try:
        if path.suffix.lower() == ".pt":
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = require("safetensors.torch", extra="train", purpose="reading saved stains").load_file(str(path))
    except ImportError:
        raise
    except Exception as error:  # the readers of both formats raise several kinds
        raise ValueError(f"{str(path)!r} cannot be read as saved stains: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{str(path)!r} is no state dict of a normaliser.")
    return state
