"""Makes the modules of this folder importable: benches are collected with importmode=importlib."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
