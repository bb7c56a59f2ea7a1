"""Runs that are killed, fill the disk, or meet another run: nothing lost, nothing half, nothing twice."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from ernet_fast.console.atomic_file import PendingFile
from ernet_fast.scale import Summary, normalize_files, pipeline, run
from ernet_fast.scale.journal import Journal, journal_of, read_journals
from ernet_fast.scale.run_folder import NAME

COUNT = 12


@pytest.fixture
def archive(tmp_path: Path, write_patch) -> Path:
    """Patches in two folders, a white one and a broken one."""
    for number in range(COUNT):
        write_patch(tmp_path / "in" / f"slide {number % 2}" / f"{number:02}.jpg", number, size=(32, 32), quality=90)
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG")
    return tmp_path / "in"


def images_below(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.parent != folder]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def times_below(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_mtime_ns for name in images_below(folder)}


def child(work: Callable[[], object]) -> int:
    """Run `work` in a process of its own; its exit code, negative for a signal."""
    process = os.fork()
    if process == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def die_at(number: int) -> None:
    """From now on this process kills itself where it touches the disk for the `number`-th time, in the middle of it."""
    left = number

    def dying(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                if function is write:
                    journal, data = arguments
                    write(journal, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return call

    write = Journal._write
    Journal._write = dying(write)
    for name in ("replace", "link", "fsync", "unlink"):
        setattr(os, name, dying(getattr(os, name)))


@pytest.mark.parametrize("fit", ["per-image", "per-folder"])
def test_killed_at_any_moment(archive, tmp_path, fit):
    out, whole = tmp_path / "out", tmp_path / "whole"
    expected = normalize_files(archive, whole, fit=fit, status=tmp_path / "whole.csv")

    def doomed(point: int) -> None:
        die_at(point)
        normalize_files(archive, out, fit=fit, workers=2)

    killed = 0
    for point in [1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 16, 20, 25, 30]:
        if (out / NAME).exists():
            finished = {record.status.output: os.stat(record.status.output).st_mtime_ns
                        for record in read_journals(out).done.values() if record.status.output}  # fmt: skip
        else:
            finished = {}
        killed += child(partial(doomed, point)) == -signal.SIGKILL
        assert {name: os.stat(name).st_mtime_ns for name in finished} == finished, "what is done is not done again"
        for name, data in images_below(out).items():
            if not name.endswith(".tmp"):
                assert data == images_below(whole)[name], "no output is half written"
    assert killed >= 8
    summary = normalize_files(archive, out, fit=fit, status=tmp_path / "out.csv")
    assert images_below(out) == images_below(whole), "the same bytes, and no temporary file"
    assert [file.stains for file in summary.files] == [file.stains for file in expected.files]
    table = (tmp_path / "out.csv").read_text()
    assert table == (tmp_path / "whole.csv").read_text().replace(f"{whole}/", f"{out}/")


def test_killed_while_settings_change(archive, tmp_path):
    """Whatever is there after the kill, a run with either settings gives images of one kind."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    normalize_files(archive, whole, quality=50)
    for point in (1, 3, 8, 14, 20, 40):
        shutil.rmtree(out, ignore_errors=True)
        normalize_files(archive, out)

        def doomed(point: int = point) -> None:
            die_at(point)
            normalize_files(archive, out, quality=50, overwrite=True)

        child(doomed)
        try:
            normalize_files(archive, out, quality=50)
        except ValueError as error:
            assert "quality was None, now 50" in str(error)
            normalize_files(archive, out, quality=50, overwrite=True)
        assert images_below(out) == images_below(whole)


class TestJournal:
    def test_damage_costs_the_damaged_files_alone(self, archive, tmp_path):
        out = tmp_path / "out"
        normalize_files(archive, out)
        before, times = images_below(out), times_below(out)
        path = journal_of(out)
        lines = path.read_bytes().splitlines(keepends=True)
        done = [number for number, line in enumerate(lines) if b'"done":"slide' in line]
        lines[done[2]] = lines[done[2]].replace(b'"status":"ok"', b'"status":"OK"')
        cut = len(b"".join(lines)) - 5
        path.write_bytes(b"".join(lines)[:cut] if done[-1] == len(lines) - 1 else b"".join(lines))
        summary = normalize_files(archive, out)
        assert summary.counts == {"ok": COUNT, "error": 1} and images_below(out) == before
        assert COUNT - 2 <= len(summary.done_before) <= COUNT - 1
        again = {name for name, time in times_below(out).items() if time != times[name]}
        assert len(again) == COUNT - len(summary.done_before)

    def test_lost_with_the_outputs_there(self, archive, tmp_path):
        out = tmp_path / "out"
        normalize_files(archive, out)
        journal_of(out).unlink()
        summary = normalize_files(archive, out)
        assert summary.counts == {"skipped": COUNT, "error": 1} and "no record" in summary.files[-1].reason
        assert normalize_files(archive, out, overwrite=True).counts == {"ok": COUNT, "error": 1}


class TestChanges:
    def test_a_changed_input_is_done_again(self, archive, tmp_path, write_patch):
        out = tmp_path / "out"
        normalize_files(archive, out)
        times = times_below(out)
        write_patch(archive / "slide 1" / "03.jpg", 99, size=(32, 32))
        summary = normalize_files(archive, out)
        assert {name for name, time in times_below(out).items() if time != times[name]} == {"slide 1/03.jpg"}
        assert len(summary.done_before) == COUNT - 1
        fresh = tmp_path / "fresh"
        normalize_files(archive, fresh)
        assert images_below(out) == images_below(fresh)

    def test_in_a_folder_that_is_fitted_together_all_are(self, archive, tmp_path, write_patch):
        out, fresh = tmp_path / "out", tmp_path / "fresh"
        normalize_files(archive, out, fit="per-folder")
        write_patch(archive / "slide 1" / "03.jpg", 99, size=(32, 32))
        summary = normalize_files(archive, out, fit="per-folder")
        assert {Path(name).parent.name for name in summary.done_before} == {"slide 0"}
        normalize_files(archive, fresh, fit="per-folder")
        assert images_below(out) == images_below(fresh)

    def test_nothing_old_passes_for_the_result_of_a_broken_input(self, archive, tmp_path):
        out = tmp_path / "out"
        normalize_files(archive, out)
        (archive / "slide 1" / "03.jpg").write_bytes(b"broken")
        assert normalize_files(archive, out).counts == {"ok": COUNT - 1, "error": 2}
        assert not (out / "slide 1" / "03.jpg").exists()

    def test_checksums_tell_a_copy_from_a_change(self, archive, tmp_path):
        out = tmp_path / "out"
        normalize_files(archive, out)
        copied, forged = archive / "slide 1" / "03.jpg", archive / "slide 1" / "05.jpg"
        os.utime(copied, ns=(1, 1))
        old = forged.stat()
        data = bytearray(forged.read_bytes())
        data[-20] ^= 1  # the same size, and the same time
        forged.write_bytes(data)
        os.utime(forged, ns=(old.st_atime_ns, old.st_mtime_ns))
        times = times_below(out)
        normalize_files(archive, out, checksum=True)
        assert {name for name, time in times_below(out).items() if time != times[name]} == {"slide 1/05.jpg"}


class TestVerify:
    def reasons(self, archive: Path, out: Path, **options: object) -> dict[str, str]:
        summary: Summary = normalize_files(archive, out, verify=True, **options)
        return {Path(file.input).name: file.reason for file in summary.files if file.status == "error"}

    def test_everything_that_can_be_wrong(self, archive, tmp_path, write_patch):
        out = tmp_path / "out"
        normalize_files(archive, out)
        assert set(self.reasons(archive, out)) == {"broken.png"}
        before = times_below(out)
        data = bytearray((out / "slide 0" / "00.jpg").read_bytes())
        data[100] ^= 1
        (out / "slide 0" / "00.jpg").write_bytes(data)
        (out / "slide 0" / "02.jpg").unlink()
        write_patch(archive / "slide 0" / "04.jpg", 99)
        write_patch(archive / "slide 0" / "new.jpg", 98)
        reasons = self.reasons(archive, out)
        assert "has changed: its SHA-256" in reasons["00.jpg"] and "cannot be read" in reasons["02.jpg"]
        assert "input" in reasons["04.jpg"] and reasons["new.jpg"] == "not done yet" and len(reasons) == 5
        assert {name: before[name] for name in times_below(out)}.keys() < before.keys(), "nothing is written"

    def test_other_settings_and_no_run(self, archive, tmp_path):
        with pytest.raises(FileNotFoundError, match="no output folder"):
            normalize_files(archive, tmp_path / "out", verify=True)
        assert not (tmp_path / "out").exists()
        normalize_files(archive, tmp_path / "out")
        with pytest.raises(ValueError, match="fit was"):
            normalize_files(archive, tmp_path / "out", verify=True, fit="per-folder")


def test_of_two_runs_at_once_one_is_refused(archive, tmp_path):
    out = tmp_path / "out"
    reading, writing = os.pipe()

    def first() -> None:
        def slow(*arguments: object) -> Iterator[object]:
            os.write(writing, b"x")
            os.read(hold[0], 1)
            yield from pipeline.normalize_each(*arguments)

        run.normalize_each = slow
        normalize_files(archive, out)

    hold = os.pipe()
    process = os.fork()
    if process == 0:
        with contextlib.suppress(BaseException):
            first()
            os._exit(0)
        os._exit(7)
    os.read(reading, 1)
    for options in ({}, {"overwrite": True}, {"verify": True}):
        with pytest.raises(RuntimeError, match="another run is writing"):
            normalize_files(archive, out, **options)
    os.write(hold[1], b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert len(normalize_files(archive, out).done_before) == COUNT


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB, or one that is said to be full at some point where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(archive, tmp_path, small_disk, write_patch):
    for number in range(40):
        write_patch(archive / "more" / f"{number}.png", number, size=(32, 32))
    with pytest.raises(OSError) as caught:
        normalize_files(archive, small_disk / "out", status=tmp_path / "status.csv")
    assert caught.value.errno == errno.ENOSPC
    done = images_below(small_disk / "out")
    assert done and not [name for name in done if name.endswith(".tmp")]
    whole = tmp_path / "whole"
    normalize_files(archive, whole)
    assert all(images_below(whole)[name] == data for name, data in done.items()), "what is done is whole"
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    assert normalize_files(archive, small_disk / "out").counts == {"ok": COUNT + 40, "error": 1}
    assert images_below(small_disk / "out") == images_below(whole)


@pytest.mark.parametrize("where", ["commit", "journal"])
def test_a_disk_that_fills_up(archive, tmp_path, monkeypatch, where):
    owner, name = {"commit": (PendingFile, "commit"), "journal": (Journal, "done")}[where]
    real, room = getattr(owner, name), random.Random(1).randrange(2, COUNT - 2)

    def full(*arguments: object) -> object:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    out, whole = tmp_path / "out", tmp_path / "whole"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(owner, name, full)
        normalize_files(archive, out)
    assert not [path for path in out.rglob("*.tmp")]
    summary = normalize_files(archive, out)
    assert 0 < len(summary.done_before) < COUNT
    normalize_files(archive, whole)
    assert images_below(out) == images_below(whole)


def test_a_folder_that_is_read_only(archive, tmp_path, monkeypatch):
    def refuse(path: object, *arguments: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("ernet_fast.console.atomic_file._open_locked", refuse)
    with pytest.raises(OSError, match="Read-only file system"):
        normalize_files(archive, tmp_path / "out")
