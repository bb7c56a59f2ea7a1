"""Imports of packages that the core does not need."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import `module`, or raise ImportError: it is needed for `purpose`, and `extra` of ernet_fast brings it."""
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        what = f"{package} is needed for {purpose}"
        if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == package:
            hint = f"Install it with: pip install 'ernet_fast[{extra}]'"
            raise ImportError(f"{what}. {hint}", name=package) from None
        raise ImportError(f"{what}, but importing it failed: {error}", name=package) from error
