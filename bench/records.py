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


def same_cpu(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two machines have one model of CPU and as many cores.

    Clouds give CPUs of several families one name: a record from before the numbers were recorded is of its own CPU.
    """
    numbers = [
        [(machine.get("processor") or {}).get(key) for key in ("vendor", "family", "model")] for machine in (one, other)
    ]
    return numbers[0] == numbers[1] and all(one.get(key) == other.get(key) for key in ("cpu", "cores"))


class Records:
    """All records, the newest first."""

    def __init__(self, folder: Path = RESULTS) -> None:
        loaded = [Loaded(path, *read(path)) for path in sorted(folder.glob("*.json"))]
        self.all = sorted(loaded, key=lambda one: (one.machine["time"], one.path.name), reverse=True)
        for group in (*self.cpus(), self.of("gpu")):
            for one in group[1:]:
                for row in one.rows:
                    row.extra_info[OLDER] = True

    def cpus(self) -> list[list[Loaded]]:
        """Those measured on CPUs, of each model and number of cores together; the model of the newest record first."""
        groups: list[list[Loaded]] = []
        for one in self.all:
            if one.machine["kind"] == "cpu":
                same = next((group for group in groups if same_cpu(group[0].machine, one.machine)), None)
                if same is None:
                    groups.append([one])
                else:
                    same.append(one)
        return groups

    def of(self, kind: str) -> list[Loaded]:
        """Those measured on a "cpu" or a "gpu", of the same model as in the newest."""
        if kind == "cpu":
            return next(iter(self.cpus()), [])
        found = [one for one in self.all if one.machine["kind"] == kind]
        return [one for one in found if one.machine.get("name") == found[0].machine.get("name")]

    def newest(self, kind: str) -> dict[tuple[str, str], tuple[Row, Loaded]]:
        """(bench, name) -> the row in the newest record that has it; rows of benches that are gone are left out."""
        return newest_of(self.of(kind))

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


def newest_of(records: list[Loaded]) -> dict[tuple[str, str], tuple[Row, Loaded]]:
    """(bench, name) -> the row in the first of the records that has it; rows of benches that are gone are left out."""
    found: dict[tuple[str, str], tuple[Row, Loaded]] = {}
    for one in records:
        for row in one.rows:
            if row.bench in ("tests", "gpu_steps") or (FOLDER / f"{row.bench}.py").exists():
                found.setdefault(row.key, (row, one))
    return found
