"""Benches write their rows to a record as they finish: `--record FOLDER` (python3 dev.py bench gives it).

A bench that uses the fixture `benchmark` gives one row, from its times and `extra_info`; p20, p50, p80, unit and
repeats in `extra_info` take the place of those times. A bench that times things itself calls the fixture `record_row`.
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

from machine import describe
from progress import Progress, Session, by_importance
from record import Record, Row
from turns import percentiles

collect_ignore = ["simulated"]  # cases of `dev.py gpu --simulate`, no benches
FIGURES = ("p20", "p50", "p80", "unit", "repeats")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FOLDER", help="folder of the record that the rows are written to")
    parser.addoption("--name", action="append", metavar="TEXT", help="benches with this in their file or name only")
    parser.addoption("--slow", action="store_true", help="also benches marked slow")
    parser.addoption("--progress", metavar="FILE", help="note there which benches are done")
    parser.addoption("--resume", action="store_true", help="leave out those that are noted there")
    parser.addoption("--minutes", type=float, help="begin no bench after so many")
    parser.addoption("--compiled", action="store_true", help="also peers under torch.compile")


def pytest_configure(config: pytest.Config) -> None:
    """Note progress where that is asked for."""
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
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="slow; --slow runs it")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


def record_of(config: pytest.Config) -> Record | None:
    """The record to write to, None without --record."""
    folder = config.getoption("--record", default=None)
    if not folder:
        return None
    import ernet_fast

    return Record.of(describe("cpu", Path(ernet_fast.__file__).resolve().parents[1]), Path(folder))


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Record | None:
    """The record to write to, None without --record."""
    return record_of(request.config)


def params_of(request: pytest.FixtureRequest) -> dict[str, Any]:
    spec = getattr(request.node, "callspec", None)
    return dict(spec.params) if spec else {}


@pytest.fixture
def record_row(request: pytest.FixtureRequest, record: Record | None) -> Callable[..., Row]:
    """record_row(group, p20, p50, p80, unit, repeats, name=..., params=..., **extra_info): write one row."""

    def write(
        group: str, p20: float, p50: float, p80: float, unit: str, repeats: int,
        name: str | None = None, params: dict[str, Any] | None = None, **extra_info: Any,
    ) -> Row:  # fmt: skip
        where = params_of(request) if params is None else params
        row = Row(
            request.path.stem, name or request.node.name.removeprefix("test_"), group, where, p20, p50, p80, unit,
            repeats, extra_info,
        )  # fmt: skip
        if record is not None:
            record.add(row)
        return row

    return write


@pytest.fixture(autouse=True)
def row_of_benchmark(request: pytest.FixtureRequest, record_row: Callable[..., Row]) -> Iterator[None]:
    """Writes the row of a bench that uses pytest-benchmark."""
    benchmark = request.getfixturevalue("benchmark") if "benchmark" in request.fixturenames else None
    yield
    if benchmark is None or benchmark.stats is None or benchmark.has_error:
        return
    info = dict(benchmark.extra_info)
    seconds = benchmark.stats.stats.data
    timed = percentiles([1e3 * value for value in seconds])
    figures = {**timed, "unit": "ms", "repeats": len(seconds)} | {key: info.pop(key) for key in FIGURES if key in info}
    record_row(benchmark.group or request.path.stem, **figures, **info)


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
