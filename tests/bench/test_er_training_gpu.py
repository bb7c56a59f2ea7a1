"""The GPU cases of training and inference, run on the CPU with networks that are small enough; no speed is judged."""

from __future__ import annotations

import math

import bench_er_training_gpu as cases
import pytest
import torch
from gpu_case import Ceilings
from record import Row, Target

NOWHERE = Ceilings(math.nan, math.nan)
SMALL = cases.Setting(device="cpu", batch=4, size=64, base_channels=4, rounds=2, slice_seconds=0.0)


def check_row(row: Row, name: str, peers: set[str]) -> None:
    assert (row.bench, row.name, row.unit, row.repeats) == ("bench_er_training_gpu", name, "ms", SMALL.rounds)
    assert row.p50 > 0
    for peer in peers:
        assert row.extra_info[f"ratio_{peer}"] == pytest.approx(row.extra_info[f"{peer}_ms"] / row.p50, rel=1e-3)


def test_training_step_with_eager_peers():
    row = cases.training(50, ("plain", "naive"), "a name", SMALL, NOWHERE)
    check_row(row, "a name", {"plain", "naive"})
    assert row.extra_info["plain_share"] == pytest.approx(1 / row.extra_info["ratio_plain"], rel=1e-3)
    assert row.extra_info["images_per_second"] == pytest.approx(4e3 / row.p50, rel=1e-3)


def test_training_step_with_a_compiled_peer(monkeypatch):
    compiled = []

    def identity(model: torch.nn.Module, **options: object) -> torch.nn.Module:
        compiled.append((model, options))
        return model

    monkeypatch.setattr(cases.torch, "compile", identity)
    check_row(cases.training(50, ("compiled",), "a name", SMALL, NOWHERE), "a name", {"compiled"})
    assert len(compiled) == 1 and compiled[0][1] == {"dynamic": False}


def test_inference():
    check_row(cases.inference(50, "a name", SMALL, NOWHERE), "a name", {"naive", "naive_graphed"})


@pytest.mark.parametrize("training", [True, False])
def test_disagreement_is_an_error(training):
    models = SMALL.networks(50)
    images, _ = cases.batch_of(4, 64)
    for model in models.values():
        model(images)
        model.train(training)
    before = {name: value.clone() for name, value in models["fused"].state_dict().items()}
    cases.require_agreement(50, models, images)
    assert all(torch.equal(value, before[name]) for name, value in models["fused"].state_dict().items())
    with torch.no_grad():
        models["fused"].layer1[1].shortcut.weight[0, 0].mul_(1.5)
    with pytest.raises(AssertionError, match="fused network: error"):
        cases.require_agreement(50, models, images)


def test_cases_state_the_bars_of_the_design():
    targets = {case.name: {str(Target.parse(target)) for target in case.targets} for case in cases.gpu_cases()}
    assert targets == {
        "training er_resnet50, eager peers": {"ratio_naive >= 1.4", "plain_share <= 1"},
        "training er_resnet50, compiled peer": {"ratio_compiled >= 1.08"},
        "inference er_resnet50, one image": {"ratio_naive >= 3"},
        "training er_resnet101, eager peers": {"ratio_naive >= 1.7", "plain_share <= 1"},
        "training er_resnet101, compiled peer": {"ratio_compiled >= 1.25"},
        "inference er_resnet101, one image": {"ratio_naive >= 3"},
    }
