"""Fixtures of the benches, which are pytest-benchmark's: `pytest bench --benchmark-only` and all its options work.

`interleave` times contestants together (contestants.py), `interleave_images` on many images; `record_row` writes a row
to a record as the bench finishes, with `--record FOLDER` (python3 dev.py bench gives it), and puts what is known beside
the times into `extra_info`.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
# torch.compile would start processes of its own, which go on working while contestants are timed; read when first used
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

from contestants import Interleaver, Measured, OverImages, mark, name_of
from machine import describe
from progress import Progress, Session, by_importance
from record import Record, Row
from this_tree import time_interleaved

collect_ignore = ["simulated"]  # cases of `dev.py gpu --simulate`, no benches


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FOLDER", help="folder of the record that the rows are written to")
    parser.addoption("--name", action="append", metavar="TEXT", help="benches with this in their file or name only")
    parser.addoption("--slow", action="store_true", help="also benches marked slow")
    parser.addoption("--progress", metavar="FILE", help="note there which benches are done")
    parser.addoption("--resume", action="store_true", help="leave out those that are noted there")
    parser.addoption("--minutes", type=float, help="begin no bench after so many")
    parser.addoption("--compiled", action="store_true", help="also peers under torch.compile")
    parser.addoption("--images", type=int, metavar="N", help="of the benches over many images: N at most")
    parser.addoption("--alone", action="store_true", help="time each contestant without its peers, and nothing else")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--progress"):
        record = record_of(config)
        if record is None:
            raise pytest.UsageError("--progress needs --record")
        progress = Progress(Path(config.getoption("--progress")), record)
        config.pluginmanager.register(Session(progress, config.getoption("--resume"), config.getoption("--minutes")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Benches marked slow are left out without --slow, and those without any --name in their file or name."""
    names = config.getoption("--name") or [""]
    unwanted = [item for item in items if not any(name in item.nodeid for name in names)]
    config.hook.pytest_deselected(items=unwanted)
    items[:] = by_importance([item for item in items if item not in unwanted])
    mark(items)
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow; --slow runs it"))


def described() -> dict[str, Any]:
    """The machine, and the tree whose package is measured."""
    import ernet_fast

    return describe("cpu", Path(ernet_fast.__file__).resolve().parents[1])


def record_of(config: pytest.Config) -> Record | None:
    """The record to write to, None without --record."""
    folder = config.getoption("--record", default=None)
    return Record.of(described(), Path(folder)) if folder else None


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Record | None:
    """The record to write to, None without --record."""
    return record_of(request.config)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """pytest-benchmark's JSON describes the machine as records do."""
    machine_info["ernet_fast"] = described()


INTERLEAVER = Interleaver()


@pytest.fixture
def interleave(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., Measured]:
    """interleave(make, rounds=..., budget=..., ...): the times of the case; skips a contestant that is not measured.

    With --alone the row is written at once, and the bench ends there.
    """
    if request.config.getoption("--alone"):
        return lambda make, **options: alone(request, make, options)
    return lambda make, **options: INTERLEAVER.measure(request, make, **options)


def alone(request: pytest.FixtureRequest, make: Callable[[], Any], options: dict[str, Any]) -> None:
    """Time the contestant without its peers, write its row, and skip the rest of the bench."""
    who = request.node.callspec.params["who"]
    calls = make()
    if who not in calls:
        pytest.skip(f"{who} is not measured here")
    calls[who]()
    row_alone(request, Measured(time_interleaved({who: calls[who]}, **options)).percentiles(who))


def row_alone(request: pytest.FixtureRequest, figures: dict[str, Any]) -> None:
    """The row of a contestant that was timed without its peers; the rest of the bench is skipped."""
    request.getfixturevalue("record_row")("alone", name=request.node.name, params={}, **figures)
    pytest.skip("timed alone")


@pytest.fixture
def interleave_images(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., OverImages]:
    """interleave_images(timed): times over many images; `timed(only)` times one contestant, or all for None.

    It returns contestant -> image -> seconds, as `time_over_images`. As with `interleave`, --alone ends the bench.
    """

    def measure(timed: Callable[[str | None], dict[str, dict[int, list[float]]]]) -> OverImages:
        if not request.config.getoption("--alone"):
            return INTERLEAVER.of_case(request, lambda: OverImages(timed(None)))
        who = request.node.callspec.params["who"]
        found = OverImages(timed(who))
        if who not in found.times:
            pytest.skip(f"{who} is not measured here")
        row_alone(request, found.figures(who))
        return found

    return measure


@pytest.fixture(scope="session")
def most_images(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """most_images(count): so many images, or as few as --images asks for."""
    most = request.config.getoption("--images")
    if most is not None and most < 2:
        raise pytest.UsageError(f"--images {most}; expected 2 or more")
    return lambda count: count if most is None else min(count, most)


@pytest.fixture
def record_row(request: pytest.FixtureRequest, record: Record | None) -> Callable[..., Row]:
    """record_row(group, p20, p50, p80, unit, repeats, name=..., params=..., **extra_info): write one row."""

    def write(
        group: str, p20: float, p50: float, p80: float, unit: str, repeats: int,
        name: str | None = None, params: dict[str, Any] | None = None, **extra_info: Any,
    ) -> Row:  # fmt: skip
        if params is None:
            spec = getattr(request.node, "callspec", None)
            params = {key: value for key, value in spec.params.items() if key != "who"} if spec else {}
        name = name or name_of(request.node)
        row = Row(request.path.stem, name, group, params, p20, p50, p80, unit, repeats, extra_info)
        if "benchmark" in request.fixturenames:
            request.getfixturevalue("benchmark").extra_info |= {**row.params, **row.extra_info}
        if record is not None:
            record.add(row)
        return row

    return write


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    """What a bench has freed goes back to the system: naive networks leave gigabytes with the C library."""
    yield
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


@pytest.fixture
def with_compiled(request: pytest.FixtureRequest) -> bool:
    """Whether to measure peers under torch.compile, which takes long."""
    return bool(request.config.getoption("--compiled"))


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    """torch_threads(count): compute with so many threads until the bench ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
