"""Fused ER shortcuts and batched Macenko stain normalisation for PyTorch."""

from __future__ import annotations

from ernet_fast import _backend
from ernet_fast._version import __version__

_backend.extension_available()  # registers torch.ops.ernet.*

__all__ = ["__version__"]
