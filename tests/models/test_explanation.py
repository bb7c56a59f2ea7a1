"""What `explain` says of a model is what its forward pass then does, and saying it changes nothing."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from ernet_fast import _backend, explain, fold_for_inference
from ernet_fast.models import ERResNet, ERStage

pytestmark = pytest.mark.skipif(not _backend.extension_available(), reason=str(_backend.why_unavailable()))


def small(**options) -> ERResNet:
    torch.manual_seed(0)
    return ERResNet("basic", (2, 2, 1, 2), 2, base_channels=4, **options)


def with_hook(model: nn.Module) -> nn.Module:
    model.layer2[1].shortcut.register_forward_hook(lambda *_: None)
    return model


def other_relu(model: nn.Module) -> nn.Module:
    model.layer2[1].relu = nn.LeakyReLU()
    return model


CASES = {
    "plain": (lambda: small(), "one operator a block", "compiled operators for the CPU"),
    "group": (lambda: small(norm="group", num_groups=2), "a block each way", "compiled operators"),
    "unfused": (lambda: small(fused=False), "the modules", "fused=False"),
    "hook": (lambda: with_hook(small()), "the modules", "ERShortcut has hooks"),
    "relu": (lambda: other_relu(small()), "the modules", "is a LeakyReLU, not ReLU"),
    "folded": (lambda: fold_for_inference(small().eval()), "the modules", "folded for inference"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_forward_pass_takes_the_path_that_was_said(name, caplog):
    make, path, reason = CASES[name]
    model, x = make(), torch.randn(2, 3, 32, 32)
    state = copy.deepcopy(model.state_dict())
    found = explain(model, x)
    assert [row.name for row in found] == ["layer1", "layer2", "layer3", "layer4"]
    assert path in found[1].path and reason in found[1].reason and str(found).count("\n") == 3
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    with caplog.at_level(logging.DEBUG, logger="ernet_fast.er"):
        model(x)
    logged = [record.getMessage() for record in caplog.records if record.name == "ernet_fast.er"]
    with_blocks = [row for row in found if row.name != "layer3"]  # one block alone has no earlier map
    assert len(logged) == len(with_blocks)
    for row, message in zip(with_blocks, logged, strict=True):
        assert row.path in message and row.reason in message


def test_modes_count_where_explain_is_called():
    model, x = small(), torch.randn(2, 3, 32, 32)
    seen = []
    torch.func.vmap(lambda one: (seen.append(explain(model, x)[0].reason), one)[1])(torch.zeros(2))
    assert "torch.func" in seen[0]
    assert "empty" in explain(model, x[:0])[0].reason


def test_bad_arguments():
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(TypeError, match="got str"):
        explain("er_resnet50", x)
    with pytest.raises(TypeError, match="got tuple"):
        explain(ERStage(4, 4, 2, block="basic"), (1, 3, 8, 8))
    with pytest.raises(ValueError, match="holds no ERStage"):
        explain(nn.Conv2d(3, 3, 1), x)
