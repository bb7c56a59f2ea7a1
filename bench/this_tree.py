"""Modules of ernet_fast/benchmark of this tree, by file: `dev.py bench --compare` times the package of another one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent.parent / "ernet_fast" / "benchmark"


def module(name: str) -> ModuleType:
    """Load one of the modules that import nothing from the package."""
    known = f"benchmark_of_this_tree_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[known] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


interleaved = module("interleaved")
macenko_peers = module("macenko_peers")
percentiles, time_interleaved = interleaved.percentiles, interleaved.time_interleaved
