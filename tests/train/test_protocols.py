"""Every protocol is a set of settings that can be seen and overridden."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch

from ernet_fast.data import BreakHis
from ernet_fast.train import PROTOCOLS, TrainConfig, evaluate, fit, load_checkpoint
from ernet_fast.train.network import build_network, build_optimizer

TINY = {"base_channels": 8, "image_size": 32, "epochs": 1, "batch_size": 8, "device": "cpu", "stain": "none"}


def tiny_run(protocol, make_config):
    """The protocol on the tiny data set, with a tiny network."""
    places = make_config()
    return TrainConfig.of_protocol(protocol, data=places.data, out=places.out, **TINY)


def test_protocols_are_settings():
    known = {item.name for item in fields(TrainConfig) if item.default is not MISSING}
    assert set(PROTOCOLS) == {"paper", "recommended", "spanhol"}
    for name, preset in PROTOCOLS.items():
        assert set(preset) <= known
        config = TrainConfig.of_protocol(name, data="d", out="o")
        assert config.protocol == name and config.departures() == {}
        assert TrainConfig.from_dict(config.to_dict()) == config


def test_the_documentation_shows_what_each_protocol_sets():
    text = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    for name in {name for preset in PROTOCOLS.values() for name in preset}:
        values = [f"`{preset[name]!r}`" if name in preset else "" for preset in PROTOCOLS.values()]
        assert f"| `{name}` | {' | '.join(values)} |" in text, name


def test_the_paper(make_config, quiet, capsys):
    config = TrainConfig.of_protocol("paper", data="d", out="o")
    assert (config.split_by, config.num_folds, config.batch_size, config.epochs) == ("image", 5, 16, 100)
    assert (config.optimizer, config.lr, config.betas, config.schedule) == ("adam", 1e-4, (0.6, 0.8), "constant")
    assert (config.image_size, config.label_smoothing) == (224, 0.0)
    optimizer = build_optimizer(build_network(make_config(), 2), config)
    assert type(optimizer) is torch.optim.Adam and {group["betas"] for group in optimizer.param_groups} == {(0.6, 0.8)}
    run = tiny_run("paper", make_config)
    from ernet_fast.train import Reporter

    result = fit(run, reporter=Reporter(bars=False))
    said = capsys.readouterr().err
    assert "plan    protocol paper, but" in said and "batch_size 8 instead of 16" in said
    fold_of = load_checkpoint(result.best_checkpoint)["split"]["fold_of"]
    share = sum(fold is None for fold in fold_of.values()) / len(fold_of)
    assert share == pytest.approx(0.3, abs=0.05), "70/30, five folds within the 70"
    assert {fold for fold in fold_of.values() if fold is not None} == set(range(5))


def test_recommended(make_config, quiet):
    config = TrainConfig.of_protocol("recommended", data="d", out="o")
    assert (config.split_by, config.optimizer, config.schedule) == ("patient", "adamw", "cosine")
    assert config.warmup_epochs > 0 and config.label_smoothing > 0 and config.ema and config.precision == "bf16-mixed"
    run = tiny_run("recommended", make_config)
    result = fit(run, reporter=quiet)
    again = evaluate(result.best_checkpoint, split="val", reporter=quiet).figures()
    assert again["overall"] == result.best["val"], "the averaged weights are those that are kept"


def test_spanhol(make_config, quiet, tiny_breakhis, tmp_path):
    samples = BreakHis(tiny_breakhis, "all").samples
    held_out = {s.patient for s in BreakHis(tiny_breakhis, "test", seed=9).samples}
    lines = [f"{s.path.name}|{s.magnification}|1|{'test' if s.patient in held_out else 'train'}" for s in samples]
    (tmp_path / "dsfold1.txt").write_text("\n".join(lines))
    preset = PROTOCOLS["spanhol"] | {"split_file": str(tmp_path / "dsfold1.txt"), "protocol": "spanhol"}
    result = fit(make_config(**TINY | preset), reporter=quiet)
    state = load_checkpoint(result.best_checkpoint)
    assert set(state["train_images"]) == {s.name for s in samples if s.patient not in held_out}
    figures = evaluate(result.folder, reporter=quiet).figures()
    assert set(figures["patient_scores"]) == held_out and figures["patients_seen_in_training"] == 0


def test_trained_on_all_magnifications_and_reported_by_each(make_config, quiet):
    record = fit(make_config(**TINY), reporter=quiet).history[0]
    assert set(record["val_by_magnification"]) == {"100X", "200X"}
    one = fit(make_config("one", magnifications=(200,), **TINY), reporter=quiet)
    assert set(one.history[0]["val_by_magnification"]) == {"200X"}


def test_an_unknown_protocol_is_named():
    with pytest.raises(ValueError, match="protocol='nature'; expected one of 'paper', 'recommended', 'spanhol'"):
        TrainConfig.of_protocol("nature", data="d", out="o")


def test_gradients_of_several_batches_are_one_step(make_config, quiet, monkeypatch):
    """Without statistics of batches, two batches of four are one of eight."""
    from ernet_fast.train import learner

    def network(config, classes):
        torch.manual_seed(0)
        layers = torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        return torch.nn.Sequential(*layers, torch.nn.Linear(4, classes))

    monkeypatch.setattr(learner, "build_network", network)
    common = {**TINY, "optimizer": "sgd", "epochs": 2, "lr": 0.1}
    states = []
    for name, changes in (("whole", {"batch_size": 8}), ("parts", {"batch_size": 4, "accumulate": 2})):
        result = fit(make_config(name, **common | changes), reporter=quiet)
        states.append(load_checkpoint(result.folder / "last.pt"))
    assert states[0]["step"] == states[1]["step"]
    for name, tensor in states[0]["model"].items():
        torch.testing.assert_close(states[1]["model"][name], tensor, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="accumulate=1000, but an epoch has"):
        fit(make_config("few", accumulate=1000, **TINY), reporter=quiet)


def test_the_average_follows_its_formula():
    from ernet_fast.train.moving_average import MovingAverage

    network = torch.nn.BatchNorm1d(2)
    average = MovingAverage(network, 0.5)
    expected = torch.ones(2)
    for step in range(1, 30):
        with torch.no_grad():
            network.weight.fill_(float(step))
        network.num_batches_tracked += 1
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(average.state["weight"], expected)
    assert average.state["num_batches_tracked"] == 29
    with average.applied():
        torch.testing.assert_close(network.weight.detach(), expected)
    assert network.weight[0] == 29
