"""What may happen to a run that is under way: signals, damage, a full disk, images and losses that go bad."""

from __future__ import annotations

import csv
import dataclasses
import errno
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from same_state import assert_same, final_state

from ernet_fast.data import ImageReadError
from ernet_fast.train import (
    TrainingDivergedError,
    TrainingStoppedError,
    checkpoint,
    fit,
    learner,
    load_checkpoint,
    loop,
)
from ernet_fast.train.loss_watch import LossWatch
from ernet_fast.train.run_folder import keep_earlier, newest_checkpoint
from ernet_fast.train.training_input import TrainingInput


def at_batch(monkeypatch, number, action):
    """Do `action` when batch `number` of the coming fits is added, once."""
    real, seen = LossWatch.add, []

    def add(self, *arguments):
        seen.append(1)
        if len(seen) == number:
            action()
        real(self, *arguments)

    monkeypatch.setattr(LossWatch, "add", add)


def interrupt():
    raise KeyboardInterrupt


MANY = {"accumulate": 2, "batch_size": 4, "ema": 0.9, "sampling": "balanced", "model": "resnet18", "augment": True,
        "stain_gain": 0.1, "precision": "bf16-mixed"}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, MANY], ids=["usual", "many-settings"])
def test_a_run_goes_on_within_an_epoch(make_config, quiet, monkeypatch, changes):
    """Killed in the second epoch, behind a checkpoint of save_steps: the same bits as without."""
    changes = {"epochs": 2, "stain": "none", "cache": True} | changes
    whole = fit(make_config("whole", **changes), reporter=quiet)
    steps = load_checkpoint(whole.folder / "last.pt")["step"] // 2
    config, accumulate = make_config("parts", save_steps=2, **changes), changes.get("accumulate", 1)
    with monkeypatch.context() as patch:
        at_batch(patch, (steps + 2) * accumulate + 1, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(config, reporter=quiet)
    state = load_checkpoint(config.folder / "last.pt")
    assert state["epoch"] == 1 and steps < state["step"] < 2 * steps and state["partial"]["batches"] > 0
    torch.manual_seed(7)
    fit(config, resume=True, reporter=quiet)
    assert_same(final_state(config), final_state(make_config("whole", **changes)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_signal_ends_a_run_behind_a_checkpoint(make_config, quiet, monkeypatch, number):
    """As a scheduler signals a job: the run and its workers."""
    workers = int(number == signal.SIGTERM)
    whole, config = (make_config(name, epochs=2, stain="none", num_workers=workers) for name in ("whole", "parts"))
    fit(whole, reporter=quiet)
    before = signal.getsignal(number)

    def all_of_the_job():
        for process in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
            os.kill(process, number)

    with monkeypatch.context() as patch:
        at_batch(patch, 2, all_of_the_job)
        with pytest.raises(TrainingStoppedError, match=rf"stopped by {number.name} behind step 2: 0 of 2 epochs"):
            fit(config, reporter=quiet)
    assert signal.getsignal(number) is before
    assert load_checkpoint(config.folder / "last.pt")["step"] == 2
    fit(config, resume=True, reporter=quiet)
    assert_same(final_state(config), final_state(whole))


def test_a_signal_in_validation(make_config, quiet, monkeypatch):
    whole, config = (make_config(name, epochs=1, stain="none", ema=0.5) for name in ("whole", "parts"))
    fit(whole, reporter=quiet)
    real = loop.predict

    def predict(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "predict", predict)
        with pytest.raises(TrainingStoppedError, match="0 of 1 epochs complete"):
            fit(config, reporter=quiet)
    assert not (config.folder / "best.pt").exists()
    fit(config, resume=True, reporter=quiet)
    assert_same(final_state(config), final_state(whole))


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-100], lambda data: data[:99] + b"?" + data[100:], lambda data: b""]
)
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(make_config, quiet, capsys, damage):
    whole, config = (make_config(name, epochs=2, stain="none") for name in ("whole", "parts"))
    fit(whole, reporter=quiet)
    fit(config, reporter=quiet)
    last = config.folder / "last.pt"
    last.write_bytes(damage(last.read_bytes()))
    assert fit(config, resume=True, reporter=quiet).finished
    said = capsys.readouterr().err
    assert "last.pt is no checkpoint or is damaged" in said
    assert "going on from last-1.pt, the checkpoint before: epoch 1, step" in said
    assert_same(final_state(config), final_state(whole))
    for path in (last, config.folder / "last-1.pt"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"last\.pt is no checkpoint or is damaged"):
        fit(config, resume=True, reporter=quiet)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_checkpoints_rotate(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
    keep_earlier(tmp_path, 2)
    for number in range(5):
        keep_earlier(tmp_path, 2)
        (tmp_path / "new").write_text(str(number))
        os.replace(tmp_path / "new", tmp_path / "last.pt")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"last.pt": "4", "last-1.pt": "3", "last-2.pt": "2"}
    keep_earlier(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    with pytest.raises(ValueError, match="damaged"):
        newest_checkpoint(tmp_path)


def test_a_full_disk_within_an_epoch(make_config, quiet, monkeypatch):
    config = make_config(epochs=1, stain="none", save_steps=1)
    real = checkpoint._save

    def full(state, file):
        if state["step"] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_save", full)
        with pytest.raises(OSError, match="No space left on device, while step 2 was saved"):
            fit(config, reporter=quiet)
    assert load_checkpoint(config.folder / "last.pt")["step"] == 1
    assert fit(config, resume=True, reporter=quiet).finished


def spoil_one(config):
    """Empty the file of the first training image, once the run has begun."""
    name = load_checkpoint(config.folder / "last.pt")["train_images"][0]
    path = next(Path(config.data).rglob(f"{name}.png"))
    path.write_bytes(b"")
    return path


def test_an_image_that_goes_bad_is_replaced_and_said(make_config, quiet, tiny_breakhis, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(tiny_breakhis, data)
    config = make_config(epochs=2, data=str(data), stain="none", on_error="skip", batch_size=4)
    spoiled = []
    result = fit(
        config, reporter=quiet, on_epoch=lambda record: spoiled.append(spoil_one(config)) if not spoiled else None
    )
    assert result.finished
    said = capsys.readouterr().err
    assert said.count("unreadable since the run began, another image of its class takes its place") == 1
    with open(config.folder / "skipped.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [str(spoiled[0])] and "empty" in rows[0]["reason"]


def test_an_image_that_goes_bad_stops_a_run_that_is_to_stop(make_config, quiet, tiny_breakhis, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tiny_breakhis, data)
    config = make_config(epochs=2, data=str(data), stain="none", batch_size=4)
    spoiled = []
    with pytest.raises(ImageReadError) as caught:
        fit(config, reporter=quiet, on_epoch=lambda record: spoiled.append(spoil_one(config)))
    assert spoiled[0].name in str(caught.value)
    assert load_checkpoint(config.folder / "last.pt")["epoch"] == 1


def test_a_loss_that_is_not_finite_names_the_images(make_config, quiet, monkeypatch):
    config = make_config(epochs=1, stain="none")
    real = TrainingInput.__call__

    def poisoned(self, images, epoch, positions):
        pixels = real(self, images, epoch, positions)
        pixels[(positions == 3).nonzero()] = float("nan")
        return pixels

    monkeypatch.setattr(TrainingInput, "__call__", poisoned)
    monkeypatch.setattr(
        learner,
        "build_network",
        lambda config, classes: torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, classes)
        ),
    )
    with pytest.raises(
        TrainingDivergedError, match=r"images without a finite output: SOB_[^,]*\.png\. The last"
    ) as caught:
        fit(config, reporter=quiet)
    name = load_checkpoint(config.folder / "last.pt")["train_images"][3]
    assert f"{name}.png" in str(caught.value)


def test_more_epochs_where_the_schedule_permits(make_config, quiet):
    whole = make_config("whole", epochs=2, stain="none", schedule="constant")
    fit(whole, reporter=quiet)
    config = make_config("parts", epochs=1, stain="none", schedule="constant")
    fit(config, reporter=quiet)
    more = dataclasses.replace(config, epochs=2)
    assert fit(more, resume=True, reporter=quiet).finished
    assert_same(final_state(more), final_state(whole))
    with pytest.raises(ValueError, match="epochs was 2, now 1"):
        fit(config, resume=True, reporter=quiet)


def test_a_cosine_is_not_prolonged(make_config, quiet):
    config = make_config(epochs=1, stain="none")
    fit(config, reporter=quiet)
    with pytest.raises(ValueError, match=r"epochs was 1, now 2: with schedule='cosine'.*--weights .*last\.pt"):
        fit(dataclasses.replace(config, epochs=2), resume=True, reporter=quiet)
