"""Makes er_cases and the measuring modules of bench/ importable: tests are collected with importmode=importlib."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
