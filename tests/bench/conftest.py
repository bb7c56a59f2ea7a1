"""The modules of bench/, which is no package, and those beside the tests."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).resolve().parents[2] / "bench"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
