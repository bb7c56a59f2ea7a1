"""Records: nothing that was written is lost, and nothing that does not belong together is put together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from record import Record, Row, Target, read, without_figures

BENCH = Path(__file__).resolve().parents[2] / "bench"


def machine(**changed):
    return {
        "kind": "cpu", "name": "cpu-2-cores", "cpu": "Some CPU", "packages": {"torch": "2.13.0"}, "python": "3.11.7",
        "commit": "0123456789"[:9], "dirty": False, "sources": "feedbeef", "time": "2026-11-23T12:00:00+00:00",
        "clocks": [],
    } | changed  # fmt: skip


def row(name="a", p50=2.0, **info):
    return Row("bench_x", name, "group", {"batch": 8}, p50, p50, p50, "ms", 5, info)


def test_rows_are_on_disk_as_they_come_and_come_back(tmp_path):
    record = Record.of(machine(), tmp_path)
    assert not list(tmp_path.iterdir())
    record.add(row("a", peer="naive", peer_p50=6.0, copy_time=1.0))
    assert record.path.name == "cpu-2-cores-20261123-012345678.json"
    record.add(row("b"), without_figures("tests", "c", "FAIL", "broken"))
    found, rows = read(record.path)
    assert found == machine() and [r.name for r in rows] == ["a", "b", "c"]
    assert rows[0].extra_info["ratio"] == 3 and rows[0].extra_info["share_of_copy"] == 0.5
    assert rows == record.rows() and rows[2].status == "FAIL"
    assert [p.name for p in tmp_path.iterdir()] == [record.path.name]


def test_a_row_measured_again_replaces_the_earlier(tmp_path):
    record = Record.of(machine(), tmp_path)
    record.add(row("a", 2.0), row("b"))
    record.add(row("a", 3.0))
    assert [(r.name, r.p50) for r in record.rows()] == [("a", 3.0), ("b", 2.0)]


def test_rates_are_better_when_larger():
    rate = Row("b", "n", "g", {}, 90, 100, 110, "GB/s", 5, {"peer_p50": 50, "copy_time": 125})
    assert rate.extra_info["ratio"] == 2 and rate.extra_info["share_of_copy"] == 0.8


CRASH = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from record import Record, Row
import json
record = Record.of(json.loads(sys.argv[3]), Path(sys.argv[2]))
for name in ("first", "second"):
    record.add(Row("b", name, "g", {}, 1, 2, 3, "ms"))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_keeps_its_rows(tmp_path):
    command = [sys.executable, "-c", CRASH, str(BENCH), str(tmp_path), json.dumps(machine())]
    assert subprocess.run(command, timeout=60, check=False).returncode == -signal.SIGKILL
    record = Record.of(machine(), tmp_path)
    record.add(row("third"))
    assert [r.name for r in record.rows()] == ["first", "second", "third"]


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    pids = []
    for child in range(4):
        pid = os.fork()
        if not pid:
            for i in range(5):
                Record.of(machine(), tmp_path).add(row(f"{child}-{i}"))
            os._exit(0)
        pids.append(pid)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids)
    assert len(Record.of(machine(), tmp_path).rows()) == 20


def test_runs_of_one_tree_are_one_record_and_others_are_not(tmp_path):
    first = Record.of(machine(clocks=[{"clocks.sm": "1980 MHz"}]), tmp_path)
    first.add(row("a"), row("b"))
    later = machine(time="2026-11-23T13:00:00+00:00", clocks=[{"clocks.sm": "345 MHz"}])
    Record.of(later, tmp_path).add(row("b", 5.0))
    found, rows = read(first.path)
    assert [(r.name, r.p50) for r in rows] == [("a", 2.0), ("b", 5.0)]
    assert [c["clocks.sm"] for c in found["clocks"]] == ["1980 MHz", "345 MHz"]
    with pytest.raises(ValueError, match="packages was .*2.13.0.* and is .*2.14.0"):
        Record(first.path, machine(packages={"torch": "2.14.0"})).add(row("c"))
    assert len(read(first.path)[1]) == 2


def test_a_record_from_before_the_cpu_had_numbers_takes_more_rows(tmp_path):
    record = Record.of(machine(), tmp_path)
    record.add(row("a"))
    cpu = {"name": "Some CPU", "vendor": "AuthenticAMD", "family": 25, "model": 1}
    Record(record.path, machine(processor=cpu)).add(row("b"))
    found, rows = read(record.path)
    assert found["processor"] == cpu and [r.name for r in rows] == ["a", "b"]
    with pytest.raises(ValueError, match="processor was .*25.* and is .*26"):
        Record(record.path, machine(processor={**cpu, "family": 26})).add(row("c"))
    Record(record.path, machine()).add(row("d"))


def test_a_changed_tree_has_a_record_of_its_own(tmp_path):
    assert Record.of(machine(dirty=True), tmp_path).path.stem == "cpu-2-cores-20261123-012345678-changed-feedbe"


def test_bars():
    measured = row(ratio=4.0, share_of_copy=0.8, target=["ratio >= 5", "share_of_copy >= 0.75", "p50 <= 2", "odd >= 1"])
    assert [(str(target), value) for target, value in measured.targets()] == [
        ("ratio >= 5", 4.0), ("share_of_copy >= 0.75", 0.8), ("p50 <= 2", 2.0), ("odd >= 1", None),
    ]  # fmt: skip
    assert [value is not None and target.met(value) for target, value in measured.targets()] == [
        False,
        True,
        True,
        False,
    ]
    assert next(row(ratio=4.0, target="ratio >= 5", status="skipped").targets())[1] is None


@pytest.mark.parametrize("text", ["ratio > 5", "ratio", ">= 5", "ratio >= five", ""])
def test_bars_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="expected"):
        Target.parse(text)
    with pytest.raises(ValueError, match="expected"):
        row(target=text or [text])


def test_rows_that_make_no_sense():
    with pytest.raises(ValueError, match="in order"):
        Row("b", "n", "g", {}, 3, 2, 1, "ms")
    with pytest.raises(ValueError, match="finite"):
        Row("b", "n", "g", {}, 1, float("nan"), 1, "ms")
    with pytest.raises(ValueError, match="status"):
        row(status="fine")


def test_other_formats_are_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"rows": []}')
    with pytest.raises(ValueError, match="format None; expected 1"):
        read(path)
