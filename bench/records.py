"""All records of bench/results/, and of each row the newest measurement."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from record import RESULTS, Row, read

FOLDER = Path(__file__).resolve().parent
CORRECTNESS = ("agreement_gpu", "tests")
OLDER = "older"
"""Key of extra_info of rows that are not from the newest record of their kind; tables put a star behind their names."""


@dataclass(frozen=True)
class Loaded:
    path: Path
    machine: dict[str, Any]
    rows: list[Row]

    @cached_property
    def failures(self) -> list[str]:
        """What of the correctness of this tree failed on this machine: its speeds are not reported."""
        return [row.name for row in self.rows if row.status == "FAIL" and row.bench in CORRECTNESS]


class Records:
    """All records, the newest first."""

    def __init__(self, folder: Path = RESULTS) -> None:
        loaded = [Loaded(path, *read(path)) for path in sorted(folder.glob("*.json"))]
        self.all = sorted(loaded, key=lambda one: (one.machine["time"], one.path.name), reverse=True)
        for kind in ("cpu", "gpu"):
            for one in self.of(kind)[1:]:
                for row in one.rows:
                    row.extra_info[OLDER] = True

    def of(self, kind: str) -> list[Loaded]:
        """Those measured on a "cpu" or a "gpu", of the same model as in the newest."""
        found = [one for one in self.all if one.machine["kind"] == kind]
        keys = ("cpu", "cores") if kind == "cpu" else ("name",)
        return [one for one in found if all(one.machine.get(key) == found[0].machine.get(key) for key in keys)]

    def newest(self, kind: str) -> dict[tuple[str, str], tuple[Row, Loaded]]:
        """(bench, name) -> the row in the newest record that has it; rows of benches that are gone are left out."""
        found: dict[tuple[str, str], tuple[Row, Loaded]] = {}
        for one in self.of(kind):
            for row in one.rows:
                if row.bench in ("tests", "gpu_steps") or (FOLDER / f"{row.bench}.py").exists():
                    found.setdefault(row.key, (row, one))
        return found

    def rows(self, kind: str, bench: str = "", test: str = "") -> list[Row]:
        """The newest rows with figures: of all benches, of a module, or of a test function in it."""
        return [
            row
            for row, one in self.newest(kind).values()
            if row.status == "measured"
            and not one.failures
            and bench in ("", row.bench)
            and test in ("", row.name.partition("[")[0])
        ]
