"""Modules of ernet_fast of this tree, by file: `dev.py bench --compare` times the package of another one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "ernet_fast"


def module(name: str) -> ModuleType:
    """Load one of the modules that import next to nothing from the package, such as "benchmark/interleaved"."""
    known = f"ernet_fast_of_this_tree_{name.replace('/', '_')}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[known] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


interleaved, processor = module("benchmark/interleaved"), module("processor")
_WITH_TORCH = {"macenko_peers": "benchmark/macenko_peers", "rival_networks": "reference/rival_networks"}
percentiles, time_interleaved = interleaved.percentiles, interleaved.time_interleaved


def __getattr__(name: str) -> Any:
    """Modules loaded when they are asked for: they import torch, which a description of the machine does not."""
    if name in _WITH_TORCH:
        return module(_WITH_TORCH[name])
    raise AttributeError(name)
