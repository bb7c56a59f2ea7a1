"""What a bench module offers to `python3 dev.py gpu`: `gpu_cases()`, a list of these.

A module named `bench_*_gpu.py` defines

    def gpu_cases() -> list[GpuCase]: ...

Making the list must not touch the device (the reports call it on machines without one, for what is not yet measured).
`run` is called in a process that may be killed at any time: it allocates what it needs, compares the result with a
reference before it times anything (raise if they differ: an exception becomes a row "FAIL"), and returns its rows. It
may use torch, numpy and triton only.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import Row, Target

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Ceilings:
    """What the device at hand can do at most, measured in the same run."""

    copy_gigabytes_per_second: float  # read + written by a large copy
    bf16_teraflops: float  # of a large matrix product of random numbers


@dataclass(frozen=True)
class GpuCase:
    """One measurement: its name, how to run it, and what is expected of it.

    targets are those of the row with the case's own name, and are put into it by whoever runs the case;
    `title` is how tables for people call it.
    """

    name: str
    run: Callable[[Ceilings], Row | Sequence[Row]]
    importance: int = 1  # 0: a target of the design; 1: explains one; 2: nice to know. Run in this order.
    seconds: float = 10.0  # about what it takes, reference and compilation included
    limit: float | None = None  # seconds after which it is stopped; None: five times `seconds`, and not at once
    smoke: bool = False  # also part of the smoke level; one an operator
    headline: bool = False  # measured before the tests run
    kernel: str = ""  # what it stands or falls with: where one case hangs, later ones of the same kernel are left out
    title: str = ""
    group: str = ""
    targets: Sequence[str] = ()

    def __post_init__(self) -> None:
        for text in self.targets:
            Target.parse(text)

    @property
    def known(self) -> dict[str, Any]:
        """What the row of the case says of it."""
        return {key: value for key, value in (("title", self.title), ("target", list(self.targets))) if value}


def modules(folder: Path = FOLDER) -> list[str]:
    return sorted(path.stem for path in folder.glob("bench_*_gpu.py"))


def cases_of(module: str, folder: Path = FOLDER) -> list[GpuCase]:
    """The cases of one module of the folder, or of this one where the folder has none of this name."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    path = folder / f"{module}.py"
    spec = importlib.util.spec_from_file_location(module, path if path.exists() else FOLDER / path.name)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[module] = loaded
    spec.loader.exec_module(loaded)
    return list(loaded.gpu_cases())
