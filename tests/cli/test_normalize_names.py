"""Inputs and outputs with odd names, of odd kinds, and a summary that arrives whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ernet_fast.data.synthetic import generate_patch
from ernet_fast.scale.journal import journal_of
from ernet_fast.scale.run_folder import NAME

JOURNAL = journal_of(Path()).name
ROOT = Path(__file__).resolve().parents[2]


def write_patch(path, seed=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = generate_patch("DC", size=(32, 32), seed=seed).image
    with open(path, "wb") as file:
        Image.fromarray(np.ascontiguousarray(np.transpose(pixels, (1, 2, 0)))).save(file, format="PNG")
    return path


@pytest.fixture
def images(tmp_path):
    write_patch(tmp_path / "in" / "good.png")
    return tmp_path / "in"


def command(*arguments, **options):
    """The command in a process of its own, whose streams are strict as in a UTF-8 locale."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8:strict", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "ernet_fast", *arguments], env=environment, cwd=ROOT, capture_output=True, timeout=300,
        check=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_names_that_are_not_utf8(images, tmp_path, options):
    write_patch(Path(os.fsdecode(os.fsencode(images) + b"/caf\xe9.png")))
    Path(os.fsdecode(os.fsencode(images) + b"/broken\xff.png")).write_bytes(b"\x89PNG")
    done = command("normalize", images, tmp_path / "out", "--quiet", "--workers", "1", *options)
    assert done.returncode == 3 and done.stderr == b""
    if options:
        files = json.loads(done.stdout)["files"]
        assert {os.fsencode(Path(f["input"]).name): f["status"] for f in files} == {
            b"good.png": "normalised", b"caf\xe9.png": "normalised", b"broken\xff.png": "failed",
        }  # fmt: skip
    else:
        assert b"broken\\udcff.png" in done.stdout and b"2 normalised, 1 failed" in done.stdout
    assert set(os.listdir(os.fsencode(tmp_path / "out"))) == {
        b"good.png",
        b"caf\xe9.png",
        NAME.encode(),
        JOURNAL.encode(),
    }


@pytest.mark.parametrize("stream", ["stdout", "stderr", "both"])
def test_a_reader_that_leaves_stops_nothing_and_changes_no_exit_code(images, tmp_path, stream):
    (images / "broken.png").write_bytes(b"")
    reading, writing = os.pipe()
    os.close(reading)
    pipes = {name: writing if stream in (name, "both") else subprocess.DEVNULL for name in ("stdout", "stderr")}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ernet_fast", "normalize", images, tmp_path / "out", "--debug"], cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300, check=False, **pipes,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert done.returncode == 3 and (tmp_path / "out" / "good.png").exists()


def test_failures_come_first_and_all(call, images, tmp_path):
    for number in range(30):
        (images / f"z{number:02}.png").write_bytes(b"")
        Image.new("RGB", (8, 8), "white").save(images / f"a{number:02}.png")
    called = call("normalize", images, tmp_path / "out")
    lines = called.out.splitlines()
    assert called.code == 3 and [line.split()[0] for line in lines[:30]] == ["failed"] * 30
    assert [Path(line.split()[1]).name for line in lines[:30]] == [f"z{number:02}.png:" for number in range(30)]
    assert "... and 10 more degenerate" in called.out and "1 normalised, 30 degenerate, 30 failed" in lines[-1]


def test_an_output_that_cannot_be_written_fails_alone(call, images, tmp_path):
    (tmp_path / "out" / "folder.png").mkdir(parents=True)
    (tmp_path / "out" / "sub").write_text("a file where a folder is needed")
    for name in ("folder.png", "a" * 250 + ".png", "sub/deep.png"):
        write_patch(images / name)
    called = call("normalize", images, tmp_path / "out", "--overwrite", "--json")
    statuses = {Path(f["input"]).name: (f["status"], f["reason"]) for f in called.json["files"]}
    assert called.code == 3 and statuses["good.png"] == ("normalised", "")
    assert statuses["a" * 250 + ".png"][0] == "normalised", "the name of the temporary file is no longer"
    for name in ("folder.png", "deep.png"):
        assert statuses[name][0] == "failed" and "cannot be written" in statuses[name][1]
    assert not [path for path in (tmp_path / "out").rglob("*.tmp")]


def test_link_loops_fifos_and_resource_forks(call, images, tmp_path):
    (images / "loop.png").symlink_to("loop.png")
    (images / "nowhere.png").symlink_to("gone.png")
    os.mkfifo(images / "fifo.png")
    os.mkfifo(images / "fifo")
    write_patch(images / "__MACOSX" / "in" / "good.png")
    (images / "._good.png").write_bytes(b"\0\5\26\7")
    called = call("normalize", images, tmp_path / "out", "--json")
    found = {Path(f["input"]).name: (f["status"], f["reason"]) for f in called.json["files"]}
    assert called.code == 3 and set(found) == {"good.png", "loop.png", "nowhere.png", "fifo.png"}
    assert found["good.png"][0] == "normalised"
    assert found["loop.png"][0] == found["nowhere.png"][0] == "failed"
    assert found["fifo.png"][0] == "skipped" and "FIFO" in found["fifo.png"][1]


def test_what_killed_runs_left_is_removed(call, images, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".good.png.123.456.tmp").write_bytes(b"half")
    assert call("normalize", images, tmp_path / "out").code == 0
    assert sorted(os.listdir(tmp_path / "out")) == sorted([JOURNAL, NAME, "good.png"])


def test_tiff_stays_tiff(call, images, tmp_path):
    pixels = np.array(Image.open(images / "good.png"))
    Image.fromarray(pixels).save(images / "tile.tif", compression="tiff_lzw")
    assert call("normalize", images, tmp_path / "out").code == 0
    with Image.open(tmp_path / "out" / "tile.tif") as image:
        assert image.format == "TIFF"
        assert np.array_equal(np.array(image), np.array(Image.open(tmp_path / "out" / "good.png")))
