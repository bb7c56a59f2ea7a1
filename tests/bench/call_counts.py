"""Python calls inside ernet_fast, and how often they change the source file, of one pass of a stage and one normalise.

Every call event of `sys.setprofile` in a file of the package counts: functions, comprehensions, and each resumption of
a generator. Two calls in succession that are in different files are one change of file. Calls into torch and the
standard library are not counted, nor do they separate two calls. The counts do not depend on the machine, so that the
time which Python adds to a pass can be compared between two trees without a clock:

    PYTHONPATH=TREE python tests/bench/call_counts.py [--functions 10]
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import ernet_fast
from ernet_fast.models import ERStage
from ernet_fast.stain import MacenkoNormalizer

PACKAGE = Path(ernet_fast.__file__).resolve().parent
NUM_BLOCKS = 3  # of the stage: a projection block and two ER blocks


@dataclass
class CallCount:
    """What was counted during one call."""

    calls: int = 0
    file_changes: int = 0
    functions: Counter[str] = field(default_factory=Counter)
    """Calls by "file:function"."""


def count_calls(call: Callable[[], Any], package: Path = PACKAGE) -> CallCount:
    """Count the Python calls that `call` makes in files of the folder `package`, on this thread."""
    found, prefix = CallCount(), f"{package}/"
    last: str | None = None

    def on_event(frame: FrameType, event: str, _: object) -> None:
        nonlocal last
        file = frame.f_code.co_filename
        if event != "call" or not file.startswith(prefix):
            return
        found.calls += 1
        found.file_changes += last is not None and last != file
        found.functions[f"{file.removeprefix(prefix)}:{frame.f_code.co_name}"] += 1
        last = file

    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found


def stage_counts(layout: torch.memory_format) -> Iterator[tuple[str, CallCount]]:
    """Counts of the forward and the backward pass of a fused stage in training, the second time that they run."""
    stage = ERStage(64, 256, NUM_BLOCKS).to(memory_format=layout)
    x = torch.randn(2, 64, 8, 8).contiguous(memory_format=layout).requires_grad_()
    dy = torch.randn(2, 256, 8, 8).contiguous(memory_format=layout)
    stage(x).backward(dy)
    outputs = []
    yield "forward", count_calls(lambda: outputs.append(stage(x)))
    yield "backward", count_calls(lambda: outputs[0].backward(dy))


def macenko_count() -> CallCount:
    """Count of `normalize` of one image, the second time that it runs."""
    image = torch.randint(30, 230, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normalizer = MacenkoNormalizer().fit(image)
    normalizer.normalize(image)
    return count_calls(lambda: normalizer.normalize(image))


def all_counts() -> dict[str, CallCount]:
    """Every count by its name."""
    layouts = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
    found = {
        f"{direction} of a stage of {NUM_BLOCKS} blocks, {name}": count
        for name, layout in layouts.items()
        for direction, count in stage_counts(layout)
    }
    return found | {"MacenkoNormalizer.normalize of one image": macenko_count()}


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description="Python calls and changes of file in ernet_fast.")
    parser.add_argument("--functions", type=int, default=0, metavar="N", help="also the N functions called most often")
    limit = parser.parse_args().functions
    print(f"{PACKAGE}\n{'calls':>6} {'changes of file':>16}")
    for name, count in all_counts().items():
        print(f"{count.calls:6} {count.file_changes:16}  {name}")
        for function, calls in count.functions.most_common(limit):
            print(f"{calls:6} {'':16}    {function}")


if __name__ == "__main__":
    main()
