"""Networks to compare: the same code trains and evaluates each."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch
from torch import nn

from ernet_fast.train import TrainConfig, evaluate, fit, load_checkpoint
from ernet_fast.train.network import build_network

TINY = {"base_channels": 8, "image_size": 32, "epochs": 1, "batch_size": 8, "device": "cpu", "stain": "none"}


@pytest.fixture
def timm(monkeypatch):
    """timm where it can be imported, else a stand-in of what is used of it."""
    if importlib.util.find_spec("timm") is not None:
        return "test_resnet.r160_in1k"
    package = types.ModuleType("timm")
    package.__spec__ = importlib.machinery.ModuleSpec("timm", None)

    def create_model(name, *, pretrained, num_classes):
        if name != "tiny":
            raise RuntimeError(f"Unknown model ({name})")
        assert not pretrained
        model = nn.Sequential()
        model.add_module("conv1", nn.Conv2d(3, 16, 3, 2))
        model.add_module("bn1", nn.BatchNorm2d(16))
        model.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
        model.add_module("head", nn.Linear(16, num_classes))
        model.default_cfg = {"classifier": "head"}
        return model

    package.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", package)
    return "tiny"


def test_a_plain_resnet(make_config, quiet):
    result = fit(make_config(model="resnet18", **TINY), reporter=quiet)
    state = load_checkpoint(result.best_checkpoint)
    assert state["config"]["model"] == "resnet18" and not any("shortcut" in name for name in state["model"])
    assert evaluate(result.best_checkpoint, split="val", reporter=quiet).figures()["overall"] == result.best["val"]
    weights = result.folder / "last.pt"
    other = build_network(make_config(model="resnet18", weights=str(weights), **TINY), 5)
    assert torch.equal(other.conv1.weight, state["model"]["conv1.weight"]) and other.fc.out_features == 5


def test_a_model_of_timm(make_config, quiet, timm):
    settings = {name: value for name, value in TINY.items() if name != "base_channels"} | {"base_channels": 64}
    result = fit(make_config(model=timm, **settings), reporter=quiet)
    assert load_checkpoint(result.best_checkpoint)["config"]["model"] == timm
    assert evaluate(result.best_checkpoint, split="val", reporter=quiet).figures()["overall"] == result.best["val"]
    own = torch.load(result.folder / "last.pt", weights_only=True)["model"]
    torch.save(own, result.folder / "weights.pt")
    config = make_config("next", model=f"timm/{timm}", weights=str(result.folder / "weights.pt"), **settings)
    found = build_network(config, 7).state_dict()
    first = next(iter(own))
    assert torch.equal(found[first], own[first])
    with pytest.raises(ValueError, match=r"model='nonsense_net': .*expected er_resnet18"):
        fit(make_config("other", model="nonsense_net", **settings), reporter=quiet)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": "resnet18", "norm": "group"}, r"norm='group' with model='resnet18', which has no such setting"),
        ({"model": "resnet50", "memory": "lean"}, "memory='lean' with model='resnet50'"),
        ({"fused": False, "sync_batchnorm": True}, "sync_batchnorm=True with fused=False"),
        ({"betas": (0.9, 1.0)}, r"betas=1\.0; expected a value between 0 and"),
        ({"betas": 0.9}, "betas=0.9; expected a pair"),
        ({"zoom": (1.1, 0.9)}, "expected the smaller factor first"),
        ({"stain": "none", "stain_fit": "slide"}, "stain_fit='slide' with stain='none'; it belongs to"),
    ],
)
def test_what_is_refused(changes, match):
    with pytest.raises((ValueError, TypeError), match=match):
        TrainConfig(data="d", out="o", **changes)


def test_timm_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"model='vit'; expected one of er_resnet18.*resnet152.*ernet_fast\[timm\]"):
        TrainConfig(data="d", out="o", model="vit")
