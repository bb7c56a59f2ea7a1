"""Training: what it writes, what it learns, how it fails."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from ernet_fast.train import TrainingDivergedError, evaluate, fit, load_checkpoint
from ernet_fast.train.data_sets import class_weights
from ernet_fast.train.network import build_optimizer, build_schedule


def test_a_run_leaves_everything(make_config, quiet):
    config = make_config(epochs=2)
    result = fit(config, reporter=quiet)
    folder = Path(config.out)
    assert sorted(p.name for p in folder.iterdir()) == [
        "best.pt", "config.json", "history.csv", "history.json", "last-1.pt", "last.pt", "split.csv",
    ]  # fmt: skip
    history = json.loads((folder / "history.json").read_text())
    assert history == result.history and len(history) == 2
    with open(folder / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["train_loss"]) for row in rows] == [record["train_loss"] for record in history]
    assert set(history[0]["val_by_magnification"]) == {"100X", "200X"}
    best = load_checkpoint(result.best_checkpoint)
    assert (
        best["epoch"] == result.best["epoch"] == max(history, key=lambda r: (r["val"]["auc"], -r["val_loss"]))["epoch"]
    )


def test_two_runs_are_the_same(make_config, quiet):
    states = []
    for name in ("a", "b"):
        config = make_config(name, epochs=1)
        torch.manual_seed(hash(name) % 1000)
        fit(config, reporter=quiet)
        states.append(load_checkpoint(Path(config.out) / "last.pt")["model"])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_it_learns(make_config, quiet):
    """The training loss of 24 images falls well below that of a coin."""
    config = make_config(epochs=12, stain="none", augment=False, lr=3e-3, base_channels=16, cache=True)
    history = fit(config, reporter=quiet).history
    assert history[-1]["train_loss"] < 0.5 * torch.tensor(2.0).log() < history[0]["train_loss"]


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16-mixed", "class_weights": "balanced", "label_smoothing": 0.1},
        {"target": "subtype", "select_by": "loss", "resize": "squeeze"},
        {"norm": "group", "num_groups": 4, "block": "er133", "channels_last": False, "schedule": "constant"},
        {"fused": False, "precision": "64-true", "split_by": "image", "magnifications": (200,)},
    ],
    ids=["bf16", "subtype", "group", "naive-float64"],
)
def test_settings_work_together(make_config, quiet, changes):
    config = make_config(epochs=1, **changes)
    with pytest.warns(UserWarning, match="has no image of") if "target" in changes else _nothing():
        result = fit(config, reporter=quiet)
    assert result.finished and result.best["train_loss"] > 0
    dtype = torch.float64 if config.precision == "64-true" else torch.float32
    assert load_checkpoint(result.best_checkpoint)["model"]["conv1.weight"].dtype == dtype


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_a_diverging_run_says_where_and_keeps_the_checkpoint(make_config, quiet, monkeypatch):
    config = make_config(epochs=3)
    fit(config, stop_after=1, reporter=quiet)
    before = {name: (Path(config.out) / name).read_bytes() for name in ("last.pt", "best.pt")}
    steps = []

    class SickLoss(torch.nn.CrossEntropyLoss):
        def forward(self, output, labels):
            steps.append(1)
            return super().forward(output, labels) * (float("nan") if len(steps) == 2 else 1.0)

    monkeypatch.setattr(torch.nn, "CrossEntropyLoss", SickLoss)
    per_epoch = load_checkpoint(Path(config.out) / "last.pt")["step"]
    with pytest.raises(TrainingDivergedError, match=rf"nan at step {per_epoch + 2} \(epoch 2\).*smaller --lr"):
        fit(config, resume=True, reporter=quiet)
    assert {name: (Path(config.out) / name).read_bytes() for name in before} == before


def test_stain_target_is_typical_kept_and_applied(make_config, quiet):
    config = make_config(epochs=1)
    fit(config, reporter=quiet)
    state = load_checkpoint(Path(config.out) / "last.pt")["stain"]
    assert state["method"] == "macenko" and state["source"].startswith("SOB_")
    assert state["normalizer"]["HERef"].shape == (3, 2)
    again = make_config("again", epochs=1, stain_target=str(next(Path(config.data).rglob(state["source"]))))
    fit(again, reporter=quiet)
    other = load_checkpoint(Path(again.out) / "last.pt")
    assert torch.equal(other["stain"]["normalizer"]["HERef"], state["normalizer"]["HERef"])
    first = load_checkpoint(Path(config.out) / "last.pt")["model"]
    assert all(torch.equal(first[key], other["model"][key]) for key in first)


def test_stain_target_without_tissue_is_refused(make_config, quiet, tmp_path):
    from PIL import Image

    Image.new("RGB", (32, 32), "white").save(tmp_path / "white.png")
    with pytest.raises(ValueError, match=r"stain target .*white\.png.*cannot be fitted: fewer than"):
        fit(make_config(stain_target=str(tmp_path / "white.png")), reporter=quiet)


def test_evaluation_prepares_images_as_training_did(make_config, quiet):
    """The validation figures of the best epoch come out again."""
    config = make_config(epochs=2)
    result = fit(config, reporter=quiet)
    again = evaluate(result.best_checkpoint, split="val", reporter=quiet).figures()
    assert again["overall"] == result.best["val"]
    assert again["loss"] == result.best["val_loss"]
    assert again["by_magnification"] == result.best["val_by_magnification"]
    assert again["images_seen_in_training"] == again["patients_seen_in_training"] == 0


def test_evaluation_on_training_patients_warns(make_config, quiet, capsys):
    result = fit(make_config(epochs=1), reporter=quiet)
    figures = evaluate(result.best_checkpoint, split="all", reporter=quiet).figures()
    assert figures["images_seen_in_training"] > 0 and "warning: the network was trained on" in capsys.readouterr().err


def test_class_weights_are_inverse_to_frequency(tiny_breakhis):
    from ernet_fast.data import BreakHis

    samples = BreakHis(tiny_breakhis, "train").samples
    benign = [s for s in samples if s.label == 0]
    malignant = [s for s in samples if s.label == 1][: len(benign) // 2]
    weights = class_weights([*benign, *malignant], 3, "balanced")
    n = len(benign) + len(malignant)
    assert weights.tolist() == pytest.approx([n / (2 * len(benign)), n / (2 * len(malignant)), 0.0])
    assert class_weights(samples, 2, "none") is None


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle", "constant"])
def test_schedules_stay_within_the_highest_rate(make_config, schedule):
    config = make_config(epochs=5, schedule=schedule, lr=0.1, optimizer="sgd")
    model = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(model, config)
    plan = build_schedule(optimizer, config, steps_per_epoch=4)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        plan.step()
    assert 0.09 < max(rates) < 0.1 + 1e-9 and min(rates) > 0  # one-cycle peaks between two steps
    last = optimizer.param_groups[0]["lr"]
    assert last == pytest.approx(0.1) if schedule == "constant" else last < 1e-3


def test_only_matrices_decay(make_config):
    from ernet_fast.train.network import build_network

    model = build_network(make_config(weight_decay=0.1), 2)
    optimizer = build_optimizer(model, make_config(weight_decay=0.1))
    decaying = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    expected = {id(p) for n, p in model.named_parameters() if p.ndim > 1 and "shortcut" not in n}
    assert decaying == expected
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
