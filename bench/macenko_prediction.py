"""The images a second that docs/macenko-gpu.md predicts for an H200, from the machine code of the kernels."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "macenko-gpu.md"
ROW = re.compile(r"\| normalize (\S+) \|(?:[^|]*\|){4} ([\d,]+) \|")


def predicted_images_a_second(size: str, page: Path = PAGE) -> float | None:
    """What is expected of batches that fill the device; None where the page has no prediction."""
    for line in page.read_text().splitlines():
        found = ROW.match(line)
        if found and found[1] == size:
            return float(found[2].replace(",", ""))
    return None
