"""Checkpoints are replaced whole and cannot run code."""

from __future__ import annotations

import os
import pickle

import pytest
import torch

from ernet_fast.console import atomic_file
from ernet_fast.console.atomic_file import atomic_write, write_text
from ernet_fast.train.checkpoint import (
    FORMAT,
    generator_state,
    load_checkpoint,
    restore_generators,
    save_checkpoint,
)

COMPLETE = {
    "format": FORMAT, "version": "0", "model": {"w": torch.arange(3.0)}, "optimizer": {}, "schedule": {},
    "precision": {},
    "epoch": 1, "step": 2, "history": [], "best": {}, "rng": generator_state(), "config": {}, "classes": ["a"],
    "train_images": [], "stain": None,
}  # fmt: skip


def test_round_trip(tmp_path):
    save_checkpoint(tmp_path / "a.pt", COMPLETE)
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert torch.equal(loaded["model"]["w"], COMPLETE["model"]["w"]) and loaded.keys() == COMPLETE.keys()


@pytest.mark.parametrize("failure", [RuntimeError("disk full"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_a_crash_in_the_middle_of_writing_keeps_the_old_file(tmp_path, monkeypatch, failure):
    path = tmp_path / "a.pt"
    save_checkpoint(path, COMPLETE)

    def broken_save(state, file):
        file.write(b"half a checkpoint")
        raise failure

    monkeypatch.setattr(torch, "save", broken_save)
    with pytest.raises(type(failure)):
        save_checkpoint(path, {**COMPLETE, "epoch": 99})
    assert load_checkpoint(path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_process_that_dies_while_writing_keeps_the_old_file(tmp_path):
    """Death without any clean-up, in a child: the old file is whole, whatever else lies beside it."""
    path = tmp_path / "a.pt"
    save_checkpoint(path, COMPLETE)
    child = os.fork()
    if child == 0:
        with atomic_write(path) as file:
            file.write(b"x" * 10_000)
            file.flush()
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert load_checkpoint(path)["epoch"] == 1


def test_the_bytes_reach_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    calls = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(atomic_file.os, "fsync", lambda fd: (calls.append("fsync"), real_fsync(fd))[1])
    monkeypatch.setattr(atomic_file.os, "replace", lambda a, b: (calls.append("replace"), real_replace(a, b))[1])
    write_text(tmp_path / "a.txt", "text")
    assert calls[:2] == ["fsync", "replace"]


def test_a_new_file_has_ordinary_permissions(tmp_path):
    write_text(tmp_path / "a.txt", "text")
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o666 & ~mask


class _Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/ernet_fast_evil",))


def test_a_file_cannot_run_code(tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({**COMPLETE, "model": _Evil()}, path)
    with pytest.raises(ValueError, match="no checkpoint or is damaged"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(_Evil(), protocol=2))
    with pytest.raises(ValueError, match="no checkpoint or is damaged"):
        load_checkpoint(path)


def test_damage_is_reported(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, COMPLETE)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"a\.pt is no checkpoint or is damaged"):
        load_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "missing.pt")


def test_foreign_and_newer_files_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="no checkpoint of ernet_fast"):
        load_checkpoint(tmp_path / "weights.pt")
    torch.save({**COMPLETE, "format": FORMAT + 1}, tmp_path / "newer.pt")
    with pytest.raises(ValueError, match=f"reads format {FORMAT}"):
        load_checkpoint(tmp_path / "newer.pt")
    torch.save({key: COMPLETE[key] for key in COMPLETE if key != "rng"}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="lacks rng"):
        load_checkpoint(tmp_path / "part.pt")
    with pytest.raises(ValueError, match="lacks rng"):
        save_checkpoint(tmp_path / "b.pt", {key: COMPLETE[key] for key in COMPLETE if key != "rng"})


def test_generators_are_restored():
    state = generator_state()
    first = torch.rand(4)
    restore_generators(state)
    assert torch.equal(torch.rand(4), first)
