"""Loading of the compiled part, once, with a reason where it cannot be loaded."""

from __future__ import annotations

import functools
import os
import re
import sys
import warnings
from typing import Any

from ernet_fast._library import PATH, Library

# Every operator of the compiled part, and its purpose.
OPERATORS = {
    "channel_moments": "ER shortcuts: mean and variance of each channel",
    "weighted_sum": "ER shortcuts: forward and backward",
    "weighted_dot": "ER shortcuts: gradients of the weights",
    "block_coefficients": "ER shortcuts: coefficients of a block's weighted sum",
    "map_dots": "ER shortcuts: inner products of a map with all gradients of sums that read it",
    "map_coefficients_backward": "ER shortcuts: gradients of weights, gamma and beta from them",
    "er_block": "ER shortcuts: the epilogue of a block",
    "er_block_backward": "ER shortcuts: its gradients",
    "shortcut_sum_backward": "ER shortcuts: gradients of a sum of maps that no block made",
    "conv_weight_gradient": "convolutions: gradients of their weights",
    "macenko_fit": "Macenko: stains of an image",
    "macenko_reconstruct": "Macenko: image with other stains",
    "macenko_reconstruct_stains": "Macenko: the same, and each stain alone",
    "macenko_normalize": "Macenko: fit and reconstruct in one",
    "macenko_change": "Macenko: image with other concentrations",
    "macenko_augment": "Macenko: fit and augmentation in one",
    "macenko_separate": "Macenko: each stain alone",
    "macenko_count_colours": "Macenko: colours of a slide, strip by strip",
    "macenko_fit_colours": "Macenko: stains of counted colours",
}
TRITON_OPERATORS = {
    "measured_coefficients": "ER shortcuts: moments and coefficients of a block in one",
    "map_backward": "ER shortcuts: inner products of a map and gradients of its weights, gamma and beta in one",
}
"""Operators that CUDA devices alone have, which `libernet.so` does not define."""

_FIX = "Install a C++ compiler (g++ or clang++) and install ernet_fast again: pip install --force-reinstall --no-deps ."
_BUILT_HERE = sys.platform == "linux"
_LINUX_ONLY = (
    f"They are built for Linux (x86-64, arm64) alone; on {sys.platform} everything else works. To fix: use Linux, in "
    "WSL or a container."
)
_AGAIN = "Install ernet_fast again: pip install --force-reinstall --no-build-isolation --no-deps ."


@functools.lru_cache(maxsize=1)
def _load() -> tuple[Library | None, str | None]:
    """The compiled library and None, or None and the reason for its absence."""
    if os.environ.get("ERNET_DISABLE_EXTENSION", "0") not in ("", "0"):
        return None, "ERNET_DISABLE_EXTENSION is set"
    if not PATH.exists():
        return None, f"ernet_fast was installed without its compiled operators. {_FIX if _BUILT_HERE else _LINUX_ONLY}"
    import torch  # the library needs libtorch in the process

    try:
        library = Library()
    except OSError as error:
        return None, f"{PATH.name} does not load: {error}. {_FIX if _BUILT_HERE else _LINUX_ONLY}"
    except AttributeError as error:  # it lacks a function
        return None, f"{PATH.name} is of another version than the Python code: {error}. {_AGAIN}"
    missing = [name for name in OPERATORS if not hasattr(torch.ops.ernet, name)]
    if missing:
        lacks = ", ".join(missing)
        return None, f"{PATH.name} is of another version than the Python code: it lacks {lacks}. {_AGAIN}"
    return library, None


def extension() -> Library | None:
    """The compiled library, or None where it cannot be loaded."""
    return _load()[0]


def extension_available() -> bool:
    """True if the compiled operators `torch.ops.ernet.*` are loaded."""
    return extension() is not None


def why_unavailable() -> str | None:
    """Why the compiled operators are not there, with the fix; None if they are."""
    return _load()[1]


def build_info() -> dict[str, Any] | None:
    """What the binary was built with (see `Library.build_info`), or None without one."""
    library = extension()
    return None if library is None else library.build_info()


def caches() -> dict[str, Any] | None:
    """The data caches that the compiled operators count on (see `Library.caches`), or None without them."""
    library = extension()
    return None if library is None else library.caches()


def streaming() -> dict[str, Any] | None:
    """How the compiled operators stream maps (see `Library.streaming`), or None without them; it may probe."""
    library = extension()
    return None if library is None else library.streaming()


def serves_capability(architectures: list[str], major: int, minor: int) -> bool:
    """Whether machine code for one of `architectures` ("80", "90a") runs on a device of this compute capability.

    Code runs on later minor versions of its major version; architecture-specific code ("90a") on its own version only.
    """
    parsed = filter(None, (re.fullmatch(r"(\d+)(\d)([a-z]?)", name) for name in architectures))
    return any(
        int(own) == major and (int(least) == minor if only else int(least) <= minor)
        for own, least, only in (match.groups() for match in parsed)
    )


def compiled_at_load(architectures: list[str], major: int, minor: int) -> bool:
    """Whether the driver can compile the kernels for a device, from the PTX of the last plain architecture."""
    plain = [int(name) for name in architectures if name.isdigit()]
    return bool(plain) and plain[-1] <= 10 * major + minor


@functools.lru_cache(maxsize=1)
def warn_fallback_once() -> None:
    """Warn, once a process, that the slow reference implementation is used, and why."""
    warnings.warn(
        f"ernet_fast runs on its slow reference implementation: {why_unavailable()}", RuntimeWarning, stacklevel=3
    )
