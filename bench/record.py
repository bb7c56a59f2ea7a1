"""The records of bench/results/: one JSON file a machine, day and commit, and the rows in it.

    <machine>-<yyyymmdd>-<commit>[-changed-<sources>].json = {"format": 1, "machine": {...}, "rows": [...]}

`machine` is what `machine.describe` found. A row is one measurement, complete in itself (a ratio never mixes two runs):

    bench, name  the module that measured it, e.g. "bench_er_stage"; unique within the bench
    group        rows that belong together in a table
    params       what was varied: {"stage": "resnet50-1", "batch": 8, "threads": 1, ...}
    p20 p50 p80  percentiles over the repeats, in `unit` ("ms", "GB/s", "MiB", ...); equal where there is one number
    repeats      how many times it was measured
    extra_info   what else is known, under these keys; others may stand beside them

        peer, peer_p50    what it is compared with, interleaved in the same run, in the same unit
        ratio             how many times better than the peer; computed from the two where it is not given
        ratio_<name>      the same where there are several peers: ratio_naive, ratio_compiled, ratio_plain
        images            how many different images p20, p50, p80 are over, each with the median of `repeats` times
        p90 p99 max       over the images; p99_of_median, max_of_median: as multiples of p50
        worst_ratio_<name>  ratio_<name> is the median over the images, this the least of them
        copy_time         what the bytes to move take at the copy bandwidth, in the same unit (for a rate, the most)
        copy_why          one line on how the bytes were counted, and which bandwidth was meant
        share_of_copy     p50 against copy_time; above 1 where caches held bytes; computed if not given
        target            "KEY >= NUMBER" or "KEY <= NUMBER", or a list of them; KEY is p20, p50, p80 or a key here
        status, detail    one of STATUSES, "measured" where it is not given; one line for people

A row is on disk when `Record.add` returns, and replaces an earlier one of the same bench and name. Several processes,
and several runs of one tree on one machine on one day, may write to one record.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
FORMAT = 1
STATUSES = ("measured", "pass", "FAIL", "skipped", "no time left")
# What must agree before two runs are one record
IDENTITY = ("kind", "name", "cpu", "driver", "packages", "python", "commit", "sources")
# The same, but for records from before it was recorded
IDENTITY_IF_KNOWN = ("processor",)
LEAST_REPEATS = 5
MORE_IS_BETTER = ("GB/s", "TFLOP/s", "images/s")
# Keys of earlier records -> keys of now; a "floor" was always bytes over copy bandwidth, which caches can beat
_RENAMED = {"bar": "target", "floor": "copy_time", "floor_why": "copy_why", "share_of_floor": "share_of_copy"}
_TARGET = re.compile(r"\s*([a-z][a-z0-9_]*)\s*(>=|<=)\s*([0-9.]+(?:e-?[0-9]+)?)\s*")


class Target(NamedTuple):
    """A number that a row has to reach: `key` of its extra_info (or p20, p50, p80), at least or at most `limit`."""

    key: str
    sense: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """From "KEY >= NUMBER" or "KEY <= NUMBER"."""
        found = _TARGET.fullmatch(text)
        if found is None:
            raise ValueError(f'target {text!r}; expected "KEY >= NUMBER" or "KEY <= NUMBER", such as "ratio >= 1.8".')
        return cls(_RENAMED.get(found[1], found[1]), found[2], float(found[3]))

    def met(self, value: float) -> bool:
        return value >= self.limit if self.sense == ">=" else value <= self.limit

    def __str__(self) -> str:
        return f"{self.key} {self.sense} {self.limit:g}"


@dataclass
class Row:
    """One measurement; see the module's docstring."""

    bench: str
    name: str
    group: str
    params: dict[str, Any]
    p20: float
    p50: float
    p80: float
    unit: str
    repeats: int = 1
    extra_info: dict[str, Any] = field(default_factory=dict)
    time: str = ""

    def __post_init__(self) -> None:
        info = self.extra_info = {_RENAMED.get(key, key): value for key, value in _plain(self.extra_info).items()}
        self.params = _plain(self.params)
        figures = self.p20, self.p50, self.p80 = [_rounded(float(value)) for value in (self.p20, self.p50, self.p80)]
        self.time = self.time or datetime.now(timezone.utc).isoformat(timespec="seconds")
        if not all(map(math.isfinite, figures)) or figures != sorted(figures):
            raise ValueError(f"row {self.name!r}: p20, p50, p80 are {figures}; expected finite numbers in order.")
        if info.get("status", "measured") not in STATUSES:
            raise ValueError(f"row {self.name!r}: status {info['status']!r}; expected one of {', '.join(STATUSES)}.")
        for text in self.target_texts():
            Target.parse(text)
        if self.p50 > 0:
            if "peer_p50" in info:
                info.setdefault("ratio", _rounded(self.times_better(info["peer_p50"])))
            if info.get("copy_time"):
                info.setdefault("share_of_copy", _rounded(self.times_better(info["copy_time"])))

    def times_better(self, other: float) -> float:
        """How many times better p50 is than `other`, which is in the same unit."""
        return self.p50 / other if self.unit in MORE_IS_BETTER else other / self.p50

    def target_texts(self) -> list[str]:
        target = self.extra_info.get("target", [])
        return [target] if isinstance(target, str) else list(target)

    def targets(self) -> Iterator[tuple[Target, float | None]]:
        """Each target with the value found, None where the row has no such number."""
        known = {**self.extra_info, "p20": self.p20, "p50": self.p50, "p80": self.p80}
        for target in map(Target.parse, self.target_texts()):
            value = known.get(target.key)
            yield target, value if isinstance(value, int | float) and self.status in ("measured", "pass") else None

    @property
    def status(self) -> str:
        return str(self.extra_info.get("status", "measured"))

    @property
    def few(self) -> str:
        """Says so where a time has too few repeats to be called a median, "" elsewhere."""
        timed = self.unit in ("us", "ms", "s") and self.status == "measured"
        return f" ({self.repeats} repeat{'s' * (self.repeats != 1)})" if timed and self.repeats < LEAST_REPEATS else ""

    @property
    def key(self) -> tuple[str, str]:
        """What makes a row the same as an earlier one."""
        return self.bench, self.name


def without_figures(bench: str, name: str, status: str, detail: str, **extra_info: Any) -> Row:
    """The row of something that has a verdict and no time: a build, a test, a bench that failed."""
    info = {"status": status, "detail": detail, **extra_info}
    return Row(bench, name, bench, {}, 0, 0, 0, "", extra_info=info)


class Record:
    """A record on disk. Opening one makes no file; the first row does."""

    def __init__(self, path: Path, machine: Mapping[str, Any]) -> None:
        self.path = path
        self.machine = dict(machine)

    @classmethod
    def of(cls, machine: Mapping[str, Any], folder: Path = RESULTS) -> Record:
        """The record of this machine, day and commit in `folder`."""
        name = re.sub(r"[^A-Za-z0-9.]+", "-", machine["name"]).strip("-")
        day = machine["time"][:10].replace("-", "")
        changed = f"-changed-{machine['sources'][:6]}" if machine["dirty"] else ""
        return cls(folder / f"{name}-{day}-{machine['commit']}{changed}.json", machine)

    def add(self, *rows: Row) -> None:
        """Write rows to disk, beside those that are there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # until it is closed
            machine, kept = self.machine, {}
            if self.path.exists():
                before, there = read(self.path)
                machine = merged_machine(before, self.machine, self.path.name)
                kept = {row.key: row for row in there}
            kept |= {row.key: row for row in rows}
            _write(self.path, machine, list(kept.values()))
        finally:
            os.close(folder)

    def rows(self) -> list[Row]:
        return read(self.path)[1] if self.path.exists() else []


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The machine and the rows of a record."""
    document = json.loads(path.read_text())
    if document.get("format") != FORMAT:
        raise ValueError(f"{path}: format {document.get('format')!r}; expected {FORMAT}.")
    return document["machine"], [Row(**_in_words_of_now(row)) for row in document["rows"]]


def _in_words_of_now(row: dict[str, Any]) -> dict[str, Any]:
    """Earlier records call block epilogues tails, in names, groups and titles."""
    info = row.get("extra_info", {})
    known = {"title": info["title"].replace("tails", "epilogues")} if "title" in info else {}
    names = {key: row[key].replace("tails", "epilogues") for key in ("name", "group")}
    return {**row, **names, "extra_info": {**info, **known}}


def merged_machine(before: Mapping[str, Any], now: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One description of two runs, which must be of one tree on one machine."""
    both = [key for key in IDENTITY_IF_KNOWN if key in before and key in now]
    for key in (*IDENTITY, *both):
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{name}: {key} was {before.get(key)!r} and is {now.get(key)!r}. One record holds runs of one tree on "
                "one machine; write this run to another folder (--out)."
            )
    clocks = before.get("clocks", [])
    clocks = clocks + [seen for seen in now.get("clocks", []) if seen not in clocks]
    return {**now, **before, "dirty": bool(before.get("dirty") or now.get("dirty")), "clocks": clocks}


def _write(path: Path, machine: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Replace the file at once, a row a line, so that a change of one row is a change of one line."""
    lines = ",\n".join(f"  {json.dumps(asdict(row), allow_nan=False)}" for row in rows)
    head = json.dumps(machine, indent=1, allow_nan=False).replace("\n", "\n ")
    temporary = path.with_suffix(f".{os.getpid()}.part")
    with temporary.open("w") as file:
        file.write(f'{{\n "format": {FORMAT},\n "machine": {head},\n "rows": [\n{lines}\n ]\n}}\n')
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _rounded(value: float) -> float:
    """Five significant digits: more than any timing has."""
    return float(f"{value:.5g}") if math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """The value in JSON's types, floats rounded, None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return _rounded(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
