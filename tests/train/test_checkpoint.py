"""Checkpoints are replaced whole and cannot run code."""

from __future__ import annotations

import errno
import os
import pickle

import pytest
import torch

from ernet_fast.console import atomic_file
from ernet_fast.console.atomic_file import atomic_write, remove_abandoned, write_text
from ernet_fast.train import checkpoint
from ernet_fast.train.checkpoint import (
    FORMAT,
    generator_state,
    load_checkpoint,
    load_network,
    restore_generators,
    save_checkpoint,
)

COMPLETE = {
    "format": FORMAT, "version": "0", "model": {"w": torch.arange(3.0)}, "optimizer": {}, "schedule": {},
    "precision": {},
    "epoch": 1, "step": 2, "history": [], "best": {}, "rng": generator_state(), "config": {}, "classes": ["a"],
    "split": {"num_folds": 2, "fold_of": {}}, "train_images": [], "val_images": [], "stain": None,
}  # fmt: skip
TARGET = {"HERef": torch.rand(3, 2, dtype=torch.float64), "maxCRef": torch.rand(2, dtype=torch.float64)}


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


def write_checked(path, state):
    """Any state with a right checksum."""
    with open(path, "wb") as file:
        file.write(checkpoint._TRAILER + checkpoint._save(state, file))


def test_a_file_cannot_run_code(tmp_path):
    path = tmp_path / "evil.pt"
    write_checked(path, {**COMPLETE, "model": _Evil()})
    with pytest.raises(ValueError, match="no checkpoint or is damaged: it holds more than tensors"):
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


def test_files_of_format_1_are_read_with_a_warning(tmp_path):
    """As the version before wrote them: by torch.save alone, without the run's split and validation images."""
    old = {key: value for key, value in COMPLETE.items() if key not in ("split", "val_images")} | {"format": 1}
    torch.save(old, tmp_path / "old.pt")
    with pytest.warns(UserWarning, match="of checkpoint format 1, without a checksum and without the run's split"):
        loaded = load_checkpoint(tmp_path / "old.pt")
    assert (
        loaded["split"] is None
        and loaded["val_images"] is None
        and torch.equal(loaded["model"]["w"], old["model"]["w"])
    )
    torch.save({**COMPLETE, "format": 2}, tmp_path / "cut.pt")  # a later file that has lost its end
    with pytest.raises(ValueError, match="does not end with the checksum"):
        load_checkpoint(tmp_path / "cut.pt")


def test_foreign_and_newer_files_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="does not end with the checksum that `ernet-fast train` writes"):
        load_checkpoint(tmp_path / "weights.pt")
    write_checked(tmp_path / "weights.pt", {"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="no checkpoint of ernet_fast"):
        load_checkpoint(tmp_path / "weights.pt")
    write_checked(tmp_path / "newer.pt", {**COMPLETE, "format": FORMAT + 1})
    with pytest.raises(ValueError, match=f"reads format {FORMAT}"):
        load_checkpoint(tmp_path / "newer.pt")
    write_checked(tmp_path / "part.pt", {key: COMPLETE[key] for key in COMPLETE if key != "rng"})
    with pytest.raises(ValueError, match="lacks rng"):
        load_checkpoint(tmp_path / "part.pt")
    with pytest.raises(ValueError, match="lacks rng"):
        save_checkpoint(tmp_path / "b.pt", {key: COMPLETE[key] for key in COMPLETE if key != "rng"})


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {**COMPLETE, "stain": {"method": "macenko", "normalizer": TARGET}})
    data = path.read_bytes()
    for position in [*range(0, len(data), 37), *range(len(data) - 80, len(data))]:
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"a\.pt is no checkpoint or is damaged: .*checksum") as caught:
            load_checkpoint(path)
        assert len(str(caught.value).splitlines()) == 1


def test_torch_alone_reads_a_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "a.pt", COMPLETE)
    for mmap in (False, True):
        found = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
        assert torch.equal(found["model"]["w"], COMPLETE["model"]["w"])


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("config", [], "settings by name"),
        ("config", None, "settings by name"),
        ("model", {"w": 1.0}, "tensors by name"),
        ("epoch", -1, "a number of epochs"),
        ("history", {}, "a list of records"),
        ("classes", "ab", "a list of names"),
        ("split", None, "a split"),
        ("train_images", [1], "a list of names"),
        ("stain", [], "None or a target"),
        ("stain", {"normalizer": {**TARGET, "HERef": torch.rand(2, 3)}}, "None or a target"),
        ("stain", {"normalizer": {**TARGET, "maxCRef": torch.tensor([1.0, float("nan")])}}, "None or a target"),
        ("stain", {"normalizer": {"HERef": TARGET["HERef"]}}, "None or a target"),
    ],
)
def test_a_field_of_another_kind_is_named(tmp_path, field, value, expected):
    save_checkpoint(tmp_path / "a.pt", {**COMPLETE, field: value})
    with pytest.raises(ValueError, match=rf"a\.pt: its '{field}' is .*; expected {expected}") as caught:
        load_checkpoint(tmp_path / "a.pt")
    assert len(str(caught.value).splitlines()) == 1


def test_torchs_advice_to_load_unsafely_is_not_passed_on(tmp_path):
    (tmp_path / "a.json").write_text('{"epoch": 1}')
    write_checked(tmp_path / "evil.pt", {**COMPLETE, "model": _Evil()})
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"format": FORMAT}))
    for name in ("a.json", "evil.pt", "pickle.pt"):
        with pytest.raises(ValueError, match="no checkpoint or is damaged") as caught:
            load_checkpoint(tmp_path / name)
        assert "weights_only" not in str(caught.value) and caught.value.__cause__ is None


def test_another_network_is_one_sentence(tmp_path):
    network = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"a\.pt: its 'model' does not fit: weight is \[3, 5\].*\[3, 2\]\.") as caught:
        load_network(network, {"model": torch.nn.Linear(5, 3).state_dict()}, tmp_path / "a.pt")
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match=r"bias is missing \(and 1 more difference"):
        load_network(network, {"model": {"weight": torch.zeros(3, 2), "x": torch.zeros(1)}}, "a.pt")


@pytest.mark.parametrize("room", [0, 5_000, 100_000])
def test_a_full_disk_is_named(tmp_path, monkeypatch, room):
    class Full:
        def __init__(self, file):
            self.file, self.room = file, room

        def write(self, data):
            self.room -= len(bytes(data))
            if self.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    real = checkpoint._save
    monkeypatch.setattr(checkpoint, "_save", lambda state, file: real(state, Full(file)))
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint(tmp_path / "a.pt", {**COMPLETE, "model": {"w": torch.zeros(50_000)}})
    assert os.listdir(tmp_path) == []


def test_temporary_files_of_killed_processes_are_removed_and_no_others(tmp_path):
    child = os.fork()
    if child == 0:
        with atomic_write(tmp_path / "a.pt") as file:
            file.write(b"half")
            file.flush()
            os._exit(7)
    os.waitpid(child, 0)
    (tmp_path / ".mine.tmp").write_text("kept")
    left = {name for name in os.listdir(tmp_path) if name.startswith(".a.pt")}
    assert len(left) == 1
    with atomic_write(tmp_path / "b.pt") as file:
        remove_abandoned(tmp_path)
        assert not left & set(os.listdir(tmp_path))
        file.write(b"whole")
    assert sorted(os.listdir(tmp_path)) == [".mine.tmp", "b.pt"] and (tmp_path / "b.pt").read_bytes() == b"whole"


def test_the_longest_name_can_be_written(tmp_path):
    for name in ("a" * 255, "\u00e9" * 127):
        write_text(tmp_path / name, "text")
    assert len(os.listdir(tmp_path)) == 2


def test_names_that_are_not_utf8_are_written_as_they_are(tmp_path):
    write_text(tmp_path / "a.csv", os.fsdecode(b"caf\xe9.png"))
    assert (tmp_path / "a.csv").read_bytes() == b"caf\xe9.png"


def test_generators_are_restored():
    state = generator_state()
    first = torch.rand(4)
    restore_generators(state)
    assert torch.equal(torch.rand(4), first)
