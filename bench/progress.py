"""A run of benches that may be cut off: the most important first, an end to its time, and what is done already."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from record import Record

# The benches behind the targets and the README come first: what a run that is cut off has, the documents can show.
ORDER = (
    "bench_macenko",
    "bench_er_stage",
    "bench_er_training",
    "bench_er_inference",
    "bench_convolution",
    "bench_er_norms",
    "bench_er_functional",
    "bench_macenko_parity",
    "bench_er_overhead",
    "bench_er_memory",
    "bench_macenko_slide",
    "bench_normalize_files",
    "bench_er_operators",
    "bench_models",  # five minutes and more
)


def by_importance(items: list[pytest.Item]) -> list[pytest.Item]:
    """The benches in this order, unknown files behind them; then those on contiguous maps, which no target is of.

    Means, which need nothing but the rows of all others, come last.
    """
    places = {name: place for place, name in enumerate(ORDER)}

    def rank(item: pytest.Item) -> tuple[bool, bool, int]:
        return is_mean(item.name), "contiguous" in item.name, places.get(item.path.stem, len(ORDER))

    return sorted(items, key=rank)


def is_mean(name: str) -> bool:
    """True for a bench that measures nothing and computes means of the rows in the record."""
    return name.split("::")[-1].split("[")[0] == "test_means"


class Progress:
    """Which benches have written all of their rows to one record: a list beside them, so that a run can go on.

    The list belongs to one record. A record is of one state of the sources, so nothing that changed is taken for done.
    """

    def __init__(self, path: Path, record: Record) -> None:
        self.path, self.of = path, str(record.path.resolve())

    def done(self) -> set[str]:
        """The names of the benches that are done; none where the record is gone."""
        if not self.path.exists() or not Path(self.of).exists():
            return set()
        head, *names = self.path.read_text().splitlines() or [""]
        return set(names) if head == self.of else set()

    def add(self, name: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".part")
        temporary.write_text("\n".join([self.of, *sorted(self.done() | {name})]) + "\n")
        temporary.replace(self.path)


class Session:
    """pytest's side of it: leaves out what is done, stops when the time is up, notes what passes."""

    def __init__(self, progress: Progress, resume: bool, minutes: float | None) -> None:
        self.progress, self.resume = progress, resume
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if self.resume:
            done = self.progress.done()
            config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
            items[:] = [item for item in items if item.nodeid not in done]

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.end is not None and time.monotonic() > self.end and not is_mean(item.name):
            pytest.skip("no time left; python3 dev.py bench --resume measures what is missing")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # what a bench itself skips, as a contestant that is not measured, is done too
        if report.when == "call" and not report.failed and not is_mean(report.nodeid):
            self.progress.add(report.nodeid)
