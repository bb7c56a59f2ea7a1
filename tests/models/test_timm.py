"""ER-ResNets by `timm.create_model`: with timm where it can be imported, else with a stand-in of what is used of it."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ernet_fast import er_resnet18, er_resnet50
from ernet_fast.models import ERResNet

MODULE = "ernet_fast.models.timm_models"


def stand_in() -> types.ModuleType:
    """timm.models: a registry, and a builder that passes arguments on, with those of the configuration set."""
    models, registry = types.ModuleType("timm.models"), {}

    def register_model(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        registry[function.__name__] = function
        return function

    def build_model_with_cfg(build: Callable[..., nn.Module], name: str, pretrained: bool, **kw: Any) -> nn.Module:
        assert not pretrained
        del kw["pretrained_cfg"], kw["pretrained_cfg_overlay"]
        model = build(**{"num_classes": 1000, "in_chans": 3, **kw})
        model.pretrained_cfg = sys.modules[MODULE].default_cfgs[name]
        return model

    def create_model(name: str, *, pretrained: bool = False, **kw: Any) -> nn.Module:
        return registry[name](pretrained=pretrained, pretrained_cfg=None, pretrained_cfg_overlay=None, **kw)

    models.register_model, models.build_model_with_cfg = register_model, build_model_with_cfg
    models.generate_default_cfgs, models.create_model = dict, create_model
    return models


@pytest.fixture
def create_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., nn.Module]]:
    try:
        models = importlib.import_module("timm.models")
        importlib.import_module(MODULE)  # once: timm warns of a name that is registered again
        yield models.create_model
        return
    except (ImportError, RuntimeError):  # not installed, or a torchvision beside it that does not load
        models = stand_in()
    package = types.ModuleType("timm")
    package.models = models
    monkeypatch.setitem(sys.modules, "timm", package)
    monkeypatch.setitem(sys.modules, "timm.models", models)
    sys.modules.pop(MODULE, None)
    importlib.import_module(MODULE)
    yield models.create_model
    sys.modules.pop(MODULE, None)


def test_create_model(create_model):
    model = create_model("er_resnet18", num_classes=2, in_chans=1, drop_rate=0.25, norm="group")
    assert isinstance(model, ERResNet)
    assert (model.num_classes, model.in_channels, model.drop_rate) == (2, 1, 0.25)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 2)
    assert create_model("er_resnet50", num_classes=5).state_dict().keys() == er_resnet50(5).state_dict().keys()


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_every_depth_is_registered(create_model, depth):
    with torch.device("meta"):
        assert create_model(f"er_resnet{depth}", num_classes=0).num_classes == 0


def test_weights_of_a_file(create_model, tmp_path):
    source = er_resnet18(num_classes=3)
    torch.save(source.state_dict(), tmp_path / "er.pt")
    model = create_model("er_resnet18", num_classes=3, weights=tmp_path / "er.pt")
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(x), source.eval()(x))


def test_what_is_refused(create_model):
    with pytest.raises(RuntimeError, match="no pretrained weights of er_resnet34 are published: use pretrained=False"):
        create_model("er_resnet34", pretrained=True)
    with pytest.raises(ValueError, match="global_pool must be 'avg', got 'max'"):
        create_model("er_resnet18", global_pool="max")
    with pytest.raises(TypeError, match="drop_path_rate"):
        create_model("er_resnet18", drop_path_rate=0.1)


def test_features(create_model):
    """timm's own extractor, by `feature_info`."""
    pytest.importorskip("timm.models._features")
    model = create_model("er_resnet18", features_only=True, out_indices=(1, 2, 4)).eval()
    assert model.feature_info.channels() == [64, 128, 512] and model.feature_info.reduction() == [4, 8, 32]
    assert [tuple(f.shape[1:]) for f in model(torch.randn(1, 3, 64, 64))] == [(64, 16, 16), (128, 8, 8), (512, 2, 2)]


def test_data_configuration(create_model):
    data = pytest.importorskip("timm.data")
    config = data.resolve_model_data_config(create_model("er_resnet18"))
    assert config["input_size"] == (3, 224, 224) and config["mean"] == (0.485, 0.456, 0.406)


def test_without_timm(monkeypatch):
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.models", None)
    with pytest.raises(ImportError, match="timm is needed for timm.create_model with ER-ResNets"):
        importlib.import_module(MODULE)
