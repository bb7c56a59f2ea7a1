"""Checkpoints as training scripts write them: each holds one network, under keys and prefixes of its own."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ernet_fast.models import ERResNet, convert_resnet, er_resnet18, load_torchvision_state_dict, read_weights

State = dict[str, Tensor]


def small(**kw: object) -> ERResNet:
    return ERResNet("basic", (2, 2, 1, 1), **({"num_classes": 5, "base_channels": 8} | kw))


@pytest.fixture(scope="module")
def trained() -> ERResNet:
    """A network whose every tensor differs from a new network's."""
    torch.manual_seed(0)
    model = small()
    model(torch.randn(2, 3, 33, 33))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def assert_holds(model: nn.Module, state: State) -> None:
    own = model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in state.items())


PREFIXES = (
    "", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.", "encoder.", "backbone.",
    "model._orig_mod.backbone.",
)  # fmt: skip
WRAPPERS: tuple[Callable[[State], dict[str, object]], ...] = (
    lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1}]}},
    lambda s: {"model_state_dict": s, "loss": 0.1},
    lambda s: {"model": s, "args": argparse.Namespace(lr=0.1)},
    lambda s: {"state_dict": s, "state_dict_ema": {name: t + 1 for name, t in s.items()}},
    lambda s: {"checkpoint": {"weights": s}},
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(trained: ERResNet, prefix: str) -> None:
    state = read_weights(prefixed(prefix)(trained.state_dict()))
    assert state.keys() == trained.state_dict().keys()
    assert_holds(trained, state)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_state_dicts(trained: ERResNet, wrap: Callable, tmp_path: Path) -> None:
    state = trained.state_dict()
    torch.save(wrap(prefixed("module.")(state)), tmp_path / "own.pt")
    model = small()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_torchvision_state_dict(model, read_weights(str(tmp_path / "own.pt")))
    assert_holds(model, state)


def test_wrappers_of_torch(trained: ERResNet) -> None:
    """State dicts of the wrappers themselves, and of a stage compiled by itself."""
    compiled_stage = small()
    compiled_stage.load_state_dict(trained.state_dict())
    compiled_stage.layer2 = torch.compile(compiled_stage.layer2)
    for wrapped in (nn.DataParallel(trained), torch.compile(trained), AveragedModel(trained), compiled_stage):
        model = small()
        load_torchvision_state_dict(model, read_weights(wrapped.state_dict()))
        assert_holds(model, trained.state_dict())


def without_classifier(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def test_an_encoder_leaves_the_classifier(trained: ERResNet, tmp_path: Path) -> None:
    state = without_classifier(trained.state_dict())
    torch.save({"state_dict": prefixed("encoder.")(state)}, tmp_path / "encoder.pt")
    model = small(num_classes=2)
    classifier = model.fc.weight.detach().clone()
    load_torchvision_state_dict(model, read_weights(tmp_path / "encoder.pt"))
    assert_holds(model, state)
    assert torch.equal(model.fc.weight, classifier)
    headless = small(num_classes=0)
    load_torchvision_state_dict(headless, state)
    assert_holds(headless, state)
    model.fc = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))
    load_torchvision_state_dict(model, state)
    load_torchvision_state_dict(model, model.state_dict())


def test_a_sequential_of_the_children(trained: ERResNet, plain_resnet: Callable[..., nn.Module]) -> None:
    plain = plain_resnet()
    sequential = nn.Sequential(*list(plain.children())[:-1])
    for prefix in ("", "backbone."):
        state = read_weights(prefixed(prefix)(sequential.state_dict()))
        expected = without_classifier(plain.state_dict())
        assert state.keys() == expected.keys()
        model = small()
        load_torchvision_state_dict(model, state)
        assert_holds(model, expected)


def test_entries_beside_the_network_are_named(trained: ERResNet) -> None:
    beside = {"projector.weight": torch.zeros(1), "criterion.weight": torch.ones(2)}
    with pytest.warns(UserWarning, match=r"prefix 'encoder\.'; left out: projector\.weight, criterion\.weight"):
        state = read_weights(prefixed("encoder.")(trained.state_dict()) | beside)
    assert state.keys() == trained.state_dict().keys()


def run_advice(error: Exception, file: Path) -> Path:
    """Run the command of an error message on `file`; the file that it writes."""
    command = re.search(r"python -c .*", str(error), re.DOTALL)
    assert command is not None
    python, *arguments = shlex.split(command[0].replace("FILE", str(file)))
    assert python == "python"
    subprocess.run([sys.executable, *arguments], check=True, timeout=120, cwd=file.parent)
    return file.parent / re.findall(r"'(\w+\.pth)'", command[0])[-1]


def test_several_networks(trained: ERResNet, tmp_path: Path) -> None:
    other = {name: tensor + 1 for name, tensor in trained.state_dict().items()}
    for k, checkpoint in enumerate([
        {"teacher": trained.state_dict(), "student": other},
        {"state_dict": prefixed("encoder_q.")(trained.state_dict()) | prefixed("encoder_k.")(other)},
    ]):  # fmt: skip
        file = tmp_path / f"{k}.pt"
        torch.save(checkpoint, file)
        with pytest.raises(ValueError, match=r"hold several networks: \['(teacher|state_dict)'\]") as error:
            read_weights(file)
        model = small()
        load_torchvision_state_dict(model, read_weights(run_advice(error.value, file)))
        assert_holds(model, trained.state_dict())


def test_the_advice_on_another_classifier(trained: ERResNet, tmp_path: Path) -> None:
    state = without_classifier(trained.state_dict())
    torch.save(
        {"model": state | {"fc.0.weight": torch.zeros(8, 64), "fc.2.weight": torch.zeros(8, 8)}}, tmp_path / "a.pt"
    )
    model = small()
    with pytest.raises(
        ValueError, match=r"another \(fc\.0\.weight, fc\.2\.weight; expected fc\.weight, fc\.bias"
    ) as error:
        load_torchvision_state_dict(model, read_weights(tmp_path / "a.pt"))
    load_torchvision_state_dict(model, read_weights(run_advice(error.value, tmp_path / "a.pt")))
    assert_holds(model, state)


def test_the_advice_on_a_file_of_more_than_tensors(plain_resnet: Callable[..., nn.Module], tmp_path: Path) -> None:
    state = convert_resnet(plain_resnet()).state_dict()
    torch.save({"state_dict": state, "hyper_parameters": Path("data")}, tmp_path / "lightning.ckpt")
    with pytest.raises(ValueError, match=r"more than tensors \(pathlib\.") as error:
        read_weights(tmp_path / "lightning.ckpt")
    model = small()
    load_torchvision_state_dict(model, read_weights(run_advice(error.value, tmp_path / "lightning.ckpt")))
    assert_holds(model, state)


def test_a_whole_network_in_a_file(tmp_path: Path) -> None:
    source = er_resnet18(2, base_channels=8)
    torch.save(source, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"more than tensors \(ernet_fast\.") as error:
        er_resnet18(2, base_channels=8, weights=tmp_path / "model.pth")
    model = er_resnet18(2, base_channels=8, weights=run_advice(error.value, tmp_path / "model.pth"))
    assert_holds(model, source.state_dict())
