"""Imports of packages that the core does not need."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import `module`, or say which extra of ernet_fast brings it.

    Args:
        module: dotted name, e.g. ``"PIL.Image"``.
        extra: the extra of this package that holds it, e.g. ``"train"``.
        purpose: what it is needed for, as it ends the sentence "... is needed for".

    Raises:
        ImportError: the package is missing; the message has the pip command.
    """
    try:
        loaded: ModuleType = importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] == package:
            raise ImportError(
                f"{package} is needed for {purpose}. Install it with: pip install 'ernet_fast[{extra}]'", name=package
            ) from None
        raise ImportError(
            f"{package} is needed for {purpose}, but importing it failed: {error}", name=package
        ) from error
    return loaded
