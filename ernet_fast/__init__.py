"""Fused ER shortcuts and batched Macenko stain normalisation for PyTorch."""

from __future__ import annotations

import importlib
from typing import Any

from ernet_fast import _moved
from ernet_fast._version import __version__
from ernet_fast.er.functional import er_shortcut_sum
from ernet_fast.er.shortcut import ERShortcut
from ernet_fast.models import (
    ERBasicBlock,
    ERBottleneck,
    ERStage,
    convert_resnet,
    er_resnet18,
    er_resnet34,
    er_resnet50,
    er_resnet101,
    er_resnet152,
    explain,
    fold_for_inference,
    logit_agreement,
    optimize_for_inference,
    to_plain,
)

__all__ = [
    "ERBasicBlock", "ERBottleneck", "ERShortcut", "ERStage", "__version__", "convert_resnet", "er_resnet18",
    "er_resnet34", "er_resnet50", "er_resnet101", "er_resnet152", "er_shortcut_sum", "explain",
    "fold_for_inference", "logit_agreement", "optimize_for_inference", "to_plain",
]  # fmt: skip

_moved.install()


def __getattr__(name: str) -> Any:
    """Subpackages and modules, imported when they are first named: `ernet_fast.stain` after `import ernet_fast`."""
    if name in ("benchmark", "data", "demo", "output_cache", "stain", "train"):
        return importlib.import_module(f"ernet_fast.{name}")
    raise AttributeError(f"module 'ernet_fast' has no attribute {name!r}")
