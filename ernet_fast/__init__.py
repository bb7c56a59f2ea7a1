"""Fused ER shortcuts and batched Macenko stain normalisation for PyTorch."""

from __future__ import annotations

from ernet_fast._version import __version__
from ernet_fast.er.functional import er_shortcut_sum
from ernet_fast.er.shortcut import ERShortcut

__all__ = ["ERShortcut", "__version__", "er_shortcut_sum"]
