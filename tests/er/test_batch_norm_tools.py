"""PyTorch's tools for BatchNorms reach the running statistics of shortcuts; state dicts keep the names they had."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from path_cases import CHANNELS, NORMS, assert_same, maps, network, stage, step
from torch import Tensor, nn
from torch.func import replace_all_batch_norm_modules_
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, update_bn

from ernet_fast import ERShortcut
from ernet_fast.er.stage import Path

FUSED = pytest.mark.parametrize("fused", [True, False])
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def batches(count: int = 3) -> list[Tensor]:
    return [maps(seed) * (seed + 1) + seed for seed in range(count)]


def running(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if name.rsplit(".")[-1] in BUFFERS}


def maps_of_blocks(model: nn.Module, x: Tensor) -> list[Tensor]:
    """x_0 ... x_l of a naive stage: the maps that its last shortcut sums."""
    seen: list[list[Tensor]] = []
    handle = model[-1].shortcut.register_forward_pre_hook(
        lambda module, args: seen.append([x.clone() for x in args[0]])
    )
    model(x)
    handle.remove()
    return seen[0]


@FUSED
def test_update_bn_is_the_cumulative_average(fused: bool) -> None:
    """Against the mean over batches of the statistics of each map, worked out by hand."""
    made, naive = stage(fused=fused), stage(fused=False).train()
    update_bn(batches(), made)
    means, variances = [], []
    with torch.no_grad():
        for x in batches():
            earlier = torch.stack(maps_of_blocks(naive, x)[:-1])
            means.append(earlier.mean((1, 3, 4)))
            variances.append(earlier.var((1, 3, 4), unbiased=True))
    last = made[-1].shortcut
    torch.testing.assert_close(last.running_mean, torch.stack(means).mean(0), **CLOSE)
    torch.testing.assert_close(last.running_var, torch.stack(variances).mean(0), **CLOSE)
    assert int(last.num_batches_tracked) == 3
    assert last.momentum == 0.1  # as before


@FUSED
def test_frozen_batch_norms(fused: bool) -> None:
    """The usual recipe, eval() of every BatchNorm: no statistic moves, and N uses the running ones."""
    made = stage(fused=fused).train()
    for module in made.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    evaluated, before = stage(fused=False).eval(), running(made)
    assert_same(step(made, maps()), step(evaluated, maps()))
    torch.testing.assert_close(running(made), before, rtol=0, atol=0)


def test_some_frozen_batch_norms() -> None:
    """The shortcuts' alone, then those of one block."""
    for frozen in (lambda name: "shortcut" in name, lambda name: name.startswith("2.")):
        made = [stage().train(), stage(fused=False).train()]
        for one in made:
            for name, module in one.named_modules():
                if isinstance(module, _BatchNorm) and frozen(name):
                    module.eval()
        for seed in range(2):
            assert_same(step(made[0], maps(seed)), step(made[1], maps(seed)))


@FUSED
@pytest.mark.parametrize("momentum", [0.0, 0.7, 1.0, None])
def test_momentum_of_every_batch_norm(momentum: float | None, fused: bool) -> None:
    """The running statistics of the last shortcut move towards those of its maps by just this fraction."""
    made, naive = stage(fused=fused).train(), stage(fused=False).train()
    for module in made.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = momentum
            module.reset_running_stats()
    assert made[-1].shortcut.momentum == momentum
    mean, var = torch.zeros(()), torch.ones(())
    for count, x in enumerate(batches(2), start=1):
        made(x)
        earlier = torch.stack(maps_of_blocks(naive, x)[:-1]).detach()
        factor = 1 / count if momentum is None else momentum
        mean = mean + factor * (earlier.mean((1, 3, 4)) - mean)
        var = var + factor * (earlier.var((1, 3, 4), unbiased=True) - var)
    torch.testing.assert_close(made[-1].shortcut.running_mean, mean, **CLOSE)
    torch.testing.assert_close(made[-1].shortcut.running_var, var, **CLOSE)


def test_reset_running_stats() -> None:
    made = stage()
    made(maps())
    for module in made.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()
    for name, value in running(made).items():
        assert torch.equal(value, torch.full_like(value, 1 if name.endswith("var") else 0)), name


@pytest.mark.parametrize("norm", NORMS)
def test_convert_sync_batch_norm(norm: str) -> None:
    """In one process: the same keys, states and results; an equal state dict loads either way."""
    made = stage(norm)
    keys, state = list(made.state_dict()), copy.deepcopy(made.state_dict())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(made))
    assert list(converted.state_dict()) == keys
    torch.testing.assert_close(dict(converted.state_dict()), dict(state), rtol=0, atol=0)
    assert not any(type(module) is nn.BatchNorm2d for module in converted.modules())
    for training in (False, True):
        converted.train(training), made.train(training)
        assert_same(step(converted, maps()), step(made, maps()))
    converted.load_state_dict(state)
    torch.testing.assert_close(dict(converted.state_dict()), dict(state), rtol=0, atol=0)
    made.load_state_dict(converted.state_dict())


@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaged_model(use_buffers: bool) -> None:
    """Of a model and three times it; buffers that are not averaged are the last model's."""
    first, second = stage(), stage()
    with torch.no_grad():
        for value in [*second.parameters(), *second.buffers()]:
            value.copy_(value * 3)
    averaged = AveragedModel(first, use_buffers=use_buffers)
    averaged.update_parameters(first), averaged.update_parameters(second)
    state = averaged.module.state_dict()
    assert list(state) == list(first.state_dict())
    for name, value in first.state_dict().items():
        if not value.is_floating_point():
            continue
        averages = use_buffers or "running" not in name
        torch.testing.assert_close(state[name], value * (2 if averages else 3), **CLOSE)


@FUSED
def test_replace_all_batch_norm_modules(fused: bool) -> None:
    """No running statistics: every BatchNorm normalises with the batch, in evaluation too, and nothing is updated."""
    made = replace_all_batch_norm_modules_(stage(fused=fused)).eval()
    assert not running(made)
    training = stage(fused=False).train()
    found, expected = step(made, maps()), step(training, maps())
    assert_same(found, {name: value for name, value in expected.items() if name in found})
    assert [name for name in expected if name not in found] == [
        name for name in expected if name.rsplit(".")[-1] in BUFFERS
    ]


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: saved_and_loaded(module),
}


def saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("make", COPIES)
def test_copies(make: str, norm: str) -> None:
    made = stage(norm).train()
    step(made, maps())
    copied = COPIES[make](made)
    assert list(copied.state_dict()) == list(made.state_dict())
    state = copy.deepcopy(made.state_dict())
    assert_same(step(copied, maps(1)), step(COPIES[make](made), maps(1)))
    torch.testing.assert_close(dict(made.state_dict()), dict(state), rtol=0, atol=0)  # no tensor is shared
    assert_same(step(made, maps(1)), step(COPIES[make](copied.load_state_dict(state) and copied), maps(1)))
    assert copied.choice(maps()).path is not Path.MODULES


@pytest.mark.parametrize("norm", NORMS)
def test_names_and_order_of_a_state_dict(norm: str) -> None:
    keys = list(network(norm, layers=(1, 1, 1, 1) if norm == "group" else (2, 1, 1, 1)).state_dict())
    if norm == "group":
        assert not any("shortcut" in key for key in keys)
        keys = list(network(norm).state_dict())
        assert [key for key in keys if "shortcut" in key] == [
            "layer1.1.shortcut.weight", "layer2.1.shortcut.weight", "layer2.2.shortcut.weight"
        ]  # fmt: skip
        return
    block = ["conv1.weight", *(f"bn1.{name}" for name in ("weight", "bias", *BUFFERS)), "conv2.weight"]
    block += [f"bn2.{name}" for name in ("weight", "bias", *BUFFERS)]
    block += [f"shortcut.{name}" for name in ("weight", *BUFFERS)]
    assert [key for key in keys if key.startswith("layer1.1.")] == [f"layer1.1.{name}" for name in block]


def test_statistics_of_a_state_dict() -> None:
    """[num_maps, channels], kept or not as for every module: detached views, the module's own with keep_vars."""
    shortcut = ERShortcut(CHANNELS, 3)
    state = shortcut.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "weight": (3, CHANNELS), "running_mean": (3, CHANNELS), "running_var": (3, CHANNELS), "num_batches_tracked": ()
    }  # fmt: skip
    state["running_mean"].fill_(2.0)
    assert torch.equal(
        shortcut.statistics.running_mean, torch.full((3 * CHANNELS,), 2.0)
    )  # one memory, as of BatchNorm
    assert list(shortcut.state_dict(prefix="a.b.")) == [f"a.b.{name}" for name in state]
    assert shortcut.state_dict(keep_vars=True)["weight"] is shortcut.weight


def test_state_dicts_that_do_not_fit_are_named() -> None:
    shortcut = ERShortcut(CHANNELS, 2)
    state = dict(shortcut.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*running_mean"):
        shortcut.load_state_dict({name: v for name, v in state.items() if name != "running_mean"})
    with pytest.raises(RuntimeError, match=r"size mismatch.*running_var"):
        shortcut.load_state_dict({**state, "running_var": torch.ones(3, CHANNELS)})
    with pytest.raises(RuntimeError, match=r"size mismatch.*running_var"):
        shortcut.load_state_dict({**state, "running_var": torch.ones(CHANNELS, 2)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*running_mean"):
        ERShortcut(CHANNELS, 2, norm="group", num_groups=1).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
        shortcut.load_state_dict({**state, "other": torch.ones(1)})
    assert set(state) == {"weight", *BUFFERS}  # what was given is not changed
