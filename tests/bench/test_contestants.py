"""Interleaved benches as pytest-benchmark shows them, and their rows in a record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import contestants
import pytest
from record import read

ROOT = Path(__file__).resolve().parents[2]
BENCH = """
import time

import pytest
from contestants import contestants


@contestants("own", "peer", "absent")
@pytest.mark.parametrize("size", [1, 2])
def test_sleep(interleave, record_row, size, who):
    seconds = {"own": 0.002 * size, "peer": 0.006 * size}

    def make():
        with open("made.txt", "a") as file:
            file.write(f"{size}\\n")
        return {name: lambda name=name: time.sleep(seconds[name]) for name in seconds}

    found = interleave(make, rounds=6, slice_seconds=0.0)
    if who == "own":
        record_row("sleep", **found.figures("own"), target="ratio_peer >= 2")
@contestants("own", "peer")
def test_images(interleave_images, record_row, most_images, who):
    def timed(only):
        every = {"own": {0: [0.001, 0.002], 1: [0.003, 0.003], 2: [0.004, 0.004]}, "peer": {0: [0.03], 2: [0.01]}}
        return {name: images for name, images in every.items() if only in (None, name)}

    found = interleave_images(timed)
    assert most_images(100) == 7
    if who == "own":
        record_row("over images", **found.figures("own"), **found.ratios("own"))
"""


@pytest.fixture
def run(tmp_path):
    """Runs the planted bench, and returns what pytest printed."""
    (tmp_path / "bench_planted.py").write_text(BENCH)
    (tmp_path / "conftest.py").write_text((ROOT / "bench" / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\nmarkers = slow: slow\n")
    paths = [str(ROOT / "bench"), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

    def call(*arguments):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--benchmark-only", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return call


@pytest.mark.slow
def test_every_contestant_is_a_benchmark_of_one_interleaved_measurement(run, tmp_path):
    files = "--benchmark-json", tmp_path / "found.json", "--record", tmp_path / "record"
    printed = run(*files, "--images", 7, "--benchmark-autosave")
    assert "6 passed, 2 skipped" in printed, "absent is skipped, once a case"
    assert (tmp_path / "made.txt").read_text().split() == ["1", "2"], "a case is timed once"
    document = json.loads((tmp_path / "found.json").read_text())
    found = {one["name"]: one for one in document["benchmarks"]}
    images = {f"test_images[{who}]": {"own": 3, "peer": 2}[who] for who in ("own", "peer")}
    assert {name: found.pop(name)["stats"]["rounds"] for name in images} == images, "a round an image"
    assert set(found) == {f"test_sleep[{size}-{who}]" for size in (1, 2) for who in ("own", "peer")}
    own, peer = found["test_sleep[1-own]"], found["test_sleep[1-peer]"]
    assert own["group"] == peer["group"] == "bench_planted: sleep[1]"
    assert own["stats"]["rounds"] == peer["stats"]["rounds"] == 6
    assert own["stats"]["median"] >= 0.002 and peer["stats"]["median"] >= 0.006
    assert peer["extra_info"]["times_slower"] == pytest.approx(peer["stats"]["median"] / own["stats"]["median"])
    assert document["machine_info"]["ernet_fast"]["kind"] == "cpu"

    (path,) = (tmp_path / "record").glob("*.json")
    rows = {row.name: row for row in read(path)[1]}
    assert_over_images(rows.pop("images"))
    assert set(rows) == {"sleep[1]", "sleep[2]"}
    row = rows["sleep[1]"]
    assert row.p50 == pytest.approx(1e3 * own["stats"]["median"], rel=1e-4) and row.repeats == 6
    assert row.extra_info["ratio_peer"] == pytest.approx(peer["extra_info"]["times_slower"], rel=1e-4)
    assert own["extra_info"]["ratio_peer"] == row.extra_info["ratio_peer"] and row.params == {"size": 1}
    assert "1 passed" in run("--benchmark-compare", "-k", "1-own")


def assert_over_images(row):
    """Percentiles are of the images' medians, ratios the images' own."""
    info = row.extra_info
    assert (row.p50, info["max"], info["images"], row.repeats) == (3, 4, 3, 2)
    assert info["p99"] == pytest.approx(3.98) and info["max_of_median"] == pytest.approx(4 / 3, rel=1e-4)
    assert info["ratio_peer"] == pytest.approx((0.03 / 0.0015 + 2.5) / 2) and info["worst_ratio_peer"] == 2.5


def test_images_of_a_contestant_alone(run, tmp_path):
    run("-k", "images", "--record", tmp_path / "record", "--images", 7, "--alone")
    ((_, rows),) = [read(path) for path in (tmp_path / "record").glob("*.json")]
    assert {row.name: row.p50 for row in rows} == {"test_images[own]": 3, "test_images[peer]": 20}


def test_a_replayed_time_is_the_time_that_was_measured():
    class Benchmark:
        def pedantic(self, function, rounds):
            found = []
            for _ in range(rounds):
                start = contestants.CLOCK()
                function()
                found.append(contestants.CLOCK() - start)
            self.found = found

    benchmark = Benchmark()
    contestants.CLOCK.replay([0.25, 1e-6, 3.0], benchmark)
    assert benchmark.found == pytest.approx([0.25, 1e-6, 3.0], rel=1e-9)


@pytest.mark.parametrize(
    ("name", "who", "expected"),
    [
        ("test_one[a-2-fused]", "fused", "one[a-2]"),
        ("test_one[fused]", "fused", "one"),
        ("test_one[a-fused]", None, "one[a-fused]"),
        ("test_one", None, "one"),
    ],
)
def test_rows_are_named_without_the_contestant(name, who, expected):
    class Item:
        pass

    item = Item()
    item.name, item.callspec = name, Item()
    item.callspec.params = {} if who is None else {"who": who}
    assert contestants.name_of(item) == expected


def test_figures_are_of_one_measurement():
    found = contestants.Measured({"own": [1.0, 3.0, 2.0], "other one": [4.0, 4.0, 5.0]}, {})
    figures = found.figures("own", "us")
    assert figures["p50"] == 2e6 and figures["repeats"] == 3 and figures["unit"] == "us"
    assert figures["other_one_us"] == 4e6 and figures["ratio_other_one"] == 2 and "ratio_own" not in figures
