"""An interrupted run, resumed, ends bit for bit where an uninterrupted one does."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from same_state import assert_same, final_state

from ernet_fast.data import BreakHis, make_splits, write_split_csv
from ernet_fast.train import checkpoint, evaluate, fit, load_checkpoint
from ernet_fast.train.checkpoint import save_checkpoint
from ernet_fast.train.describe import write_history


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


@pytest.mark.parametrize("missing", ["history.json", "history.csv"])
def test_a_kill_between_checkpoint_and_history_loses_no_record(make_config, quiet, monkeypatch, missing):
    config = make_config(epochs=2)
    fit(config, reporter=quiet)
    folder = Path(config.out)
    complete = (folder / missing).read_bytes()
    write_history(folder, load_checkpoint(folder / "last.pt")["history"][:1])  # as a kill at that moment leaves it
    assert (folder / missing).read_bytes() != complete
    assert fit(config, resume=True, reporter=quiet).finished
    assert (folder / missing).read_bytes() == complete


def grown(data: Path, folder: Path) -> Path:
    """A copy of the data with one more patient: that of an adenosis slide, under another number."""
    shutil.copytree(data, folder)
    slide = next(path for path in folder.rglob("SOB_B_A_14-*") if path.is_dir())
    number = slide.name.split("-")[1]
    copy = slide.with_name(slide.name.replace(number, "77777"))
    shutil.copytree(slide, copy)
    for image in list(copy.rglob("*.png")):
        image.rename(image.with_name(image.name.replace(number, "77777")))
    return folder


def test_a_run_goes_on_with_its_own_images_or_not_at_all(make_config, quiet, tiny_breakhis, tmp_path):
    """Patients that came later would make another split, and test patients of those trained on."""
    config = make_config(epochs=2)
    fit(config, stop_after=1, reporter=quiet)
    more = dataclasses.replace(config, data=str(grown(tiny_breakhis, tmp_path / "more")))
    with pytest.raises(ValueError, match=r"images in .*more' have changed .* 4 new \(e\.g\. SOB_B_A-14-77777"):
        fit(more, resume=True, reporter=quiet)
    best = Path(config.out) / "best.pt"
    with pytest.raises(ValueError, match=r"4 image\(s\) differ between .*more.* and the split") as caught:
        evaluate(best, data=more.data, reporter=quiet)
    assert "on_error='skip'" in str(caught.value)
    expected = evaluate(best, reporter=quiet).figures()
    found = evaluate(best, data=more.data, on_error="skip", reporter=quiet).figures()
    assert found["patient_scores"] == expected["patient_scores"] and len(found["skipped"]) == 4
    assert found["patients_seen_in_training"] == 0
    fewer = tmp_path / "fewer"
    shutil.copytree(tiny_breakhis, fewer)
    trained_on = load_checkpoint(Path(config.out) / "last.pt")["train_images"]
    next(fewer.rglob(f"{trained_on[0]}.png")).unlink()
    with pytest.raises(ValueError, match=rf"1 gone \(e\.g\. {trained_on[0]}\)"):
        fit(dataclasses.replace(config, data=str(fewer)), resume=True, reporter=quiet)


def test_a_split_file_is_needed_once(make_config, quiet, tiny_breakhis, tmp_path):
    splits = make_splits(BreakHis(tiny_breakhis, "all").samples, num_folds=3, seed=5)
    path = write_split_csv(tmp_path / "split.csv", splits)
    config = make_config(epochs=2, split_file=str(path), num_folds=2, fold=2)
    fit(config, stop_after=1, reporter=quiet)
    path.unlink()
    assert fit(config, resume=True, reporter=quiet).finished
    test = {row.image for row in splits.rows if row.fold is None}
    found = evaluate(config.folder, reporter=quiet)
    assert {sample.name for sample in found.predictions.samples} == test
    more = grown(tiny_breakhis, tmp_path / "more")
    assert len(evaluate(config.folder, data=more, split="all", reporter=quiet).predictions) == len(splits.rows) + 4


def test_an_image_damaged_since_is_not_left_out_silently(make_config, quiet, tiny_breakhis, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tiny_breakhis, data)
    config = make_config(epochs=2, data=str(data), on_error="skip")
    fit(config, stop_after=1, reporter=quiet)
    name = load_checkpoint(Path(config.out) / "last.pt")["val_images"][0]
    next(data.rglob(f"{name}.png")).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"of validation, 1 gone \(e\.g\. {name}\)"):
        fit(config, resume=True, reporter=quiet)


@pytest.mark.parametrize(
    ("field", "change", "reason"),
    [
        ("config", lambda config: config | {"lr": "fast"}, "lr='fast'"),
        ("split", lambda split: {"fold_of": {}}, "num_folds"),
        ("optimizer", lambda optimizer: optimizer | {"param_groups": []}, "parameter group"),
        ("optimizer", "moments", r"exp_avg is \[3\]"),
        ("rng", lambda rng: {}, "torch"),
        ("model", lambda model: {name: model[name] for name in model if name != "fc.bias"}, "fc.bias is missing"),
    ],
)
def test_a_field_that_does_not_fit_is_named(make_config, quiet, field, change, reason):
    config = make_config(epochs=2)
    fit(config, stop_after=1, reporter=quiet)
    last = Path(config.out) / "last.pt"
    state = load_checkpoint(last)
    if change == "moments":
        state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    else:
        state[field] = change(state[field])
    save_checkpoint(last, state)
    with pytest.raises(ValueError, match=rf"last\.pt: its '{field}' does not fit: .*{reason}") as caught:
        fit(config, resume=True, reporter=quiet)
    assert len(str(caught.value).splitlines()) == 1


def test_a_full_disk_is_named_with_the_epoch_and_can_be_resumed(make_config, quiet, monkeypatch):
    config, whole = make_config("run", epochs=2), make_config("whole", epochs=2)
    fit(whole, reporter=quiet)
    real = checkpoint._save

    def full(state, file):
        if state["epoch"] == 2:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_save", full)
        with pytest.raises(OSError, match="No space left on device, while epoch 2 of 2 was saved") as caught:
            fit(config, reporter=quiet)
    assert caught.value.errno == errno.ENOSPC
    assert load_checkpoint(Path(config.out) / "last.pt")["epoch"] == 1
    fit(config, resume=True, reporter=quiet)
    assert_same(final_state(config), final_state(whole))


def test_the_final_fit_trains_on_all_folds(make_config, quiet):
    config = make_config(epochs=2, fit_on="trainval")
    result = fit(config, stop_after=1, reporter=quiet)
    result = fit(config, resume=True, reporter=quiet)
    state = load_checkpoint(result.best_checkpoint)
    fold_of = state["split"]["fold_of"]
    assert set(state["train_images"]) == {image for image, fold in fold_of.items() if fold is not None}
    assert state["val_images"] == [] and state["epoch"] == result.best["epoch"] == 2, "the last epoch is the best"
    assert [record["val_loss"] for record in result.history] == [None, None]
    figures = evaluate(Path(config.out), reporter=quiet).figures()
    assert figures["overall"]["images"] == sum(fold is None for fold in fold_of.values())
    assert figures["patients_seen_in_training"] == 0


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
