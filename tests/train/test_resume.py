"""An interrupted run, resumed, ends bit for bit where an uninterrupted one does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from ernet_fast.train import TrainConfig, fit, load_checkpoint


def assert_same(found, expected, where="checkpoint"):
    """Equal to the last bit: tensors, numbers and structure."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    else:
        assert found == expected, where


def final_state(config: TrainConfig) -> dict:
    state = load_checkpoint(Path(config.out) / "last.pt")
    for record in (*state["history"], state["best"]):
        record.pop("train_seconds", None)  # this and the folder may differ
    del state["config"]["out"]
    return state


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "schedule": "cosine"},
        {"optimizer": "sgd", "schedule": "one-cycle", "cache": True, "stain": "none", "clip_norm": 1.0},
    ],
    ids=["adamw-cosine-macenko", "sgd-onecycle-cache"],
)
def test_four_epochs_equal_two_and_two(make_config, quiet, changes):
    whole = make_config("whole", epochs=4, **changes)
    parts = make_config("parts", epochs=4, **changes)
    assert fit(whole, reporter=quiet).finished
    first = fit(parts, stop_after=2, reporter=quiet)
    assert not first.finished and len(first.history) == 2
    torch.manual_seed(12345)  # whatever happened in between must not matter
    second = fit(parts, resume=True, reporter=quiet)
    assert second.finished and [record["epoch"] for record in second.history] == [1, 2, 3, 4]
    assert_same(final_state(parts), final_state(whole))


def test_ctrl_c_leaves_the_last_complete_epoch(make_config, quiet):
    whole, broken = make_config("whole", epochs=3), make_config("broken", epochs=3)
    fit(whole, reporter=quiet)

    def interrupt(record):
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(broken, reporter=quiet, on_epoch=interrupt)
    assert load_checkpoint(Path(broken.out) / "last.pt")["epoch"] == 2
    fit(broken, resume=True, reporter=quiet)
    assert_same(final_state(broken), final_state(whole))


def test_ctrl_c_in_the_first_epoch_can_be_resumed(make_config, quiet, monkeypatch):
    config, whole = make_config("run", epochs=1), make_config("whole", epochs=1)
    fit(whole, reporter=quiet)
    with monkeypatch.context() as patch:
        from ernet_fast.train import loop

        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        patch.setattr(loop.LossWatch, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(config, reporter=quiet)
    assert load_checkpoint(Path(config.out) / "last.pt")["epoch"] == 0
    fit(config, resume=True, reporter=quiet)
    assert_same(final_state(config), final_state(whole))


def test_the_caller_can_end_a_call(make_config, quiet):
    config = make_config(epochs=3)
    first = fit(config, reporter=quiet, on_epoch=lambda record: record["epoch"] == 1)
    assert len(first.history) == 1 and not first.finished
    assert fit(config, resume=True, reporter=quiet).finished


def test_a_finished_run_resumed_does_nothing(make_config, quiet):
    config = make_config(epochs=1)
    fit(config, reporter=quiet)
    before = (Path(config.out) / "last.pt").read_bytes()
    assert fit(config, resume=True, reporter=quiet).finished
    assert (Path(config.out) / "last.pt").read_bytes() == before


def test_resume_with_other_settings_is_refused(make_config, quiet):
    config = make_config(epochs=2)
    fit(config, stop_after=1, reporter=quiet)
    with pytest.raises(ValueError, match=r"lr was 0\.001, now 0\.5"):
        fit(dataclasses.replace(config, lr=0.5), resume=True, reporter=quiet)


def test_an_existing_run_is_not_overwritten(make_config, quiet):
    config = make_config(epochs=1)
    fit(config, reporter=quiet)
    with pytest.raises(FileExistsError, match="--resume"):
        fit(config, reporter=quiet)


def test_nothing_to_resume(make_config, quiet):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        fit(make_config("nowhere"), resume=True, reporter=quiet)


def test_resume_needs_the_starting_weights_no_more(make_config, quiet, tmp_path):
    fit(make_config("first", epochs=1), reporter=quiet)
    weights = tmp_path / "weights.pt"
    torch.save(load_checkpoint(tmp_path / "first" / "last.pt")["model"], weights)
    config = make_config("second", epochs=2, weights=str(weights))
    fit(config, stop_after=1, reporter=quiet)
    weights.unlink()
    assert fit(config, resume=True, reporter=quiet).finished
