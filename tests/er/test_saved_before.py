"""Files of an earlier version, in which running statistics were buffers of the shortcut itself, still load.

`tests/data_before` was written by torch 2.13 and commit 5eee6d1 of this library by, in essence,

    model = ERResNet("basic", (3, 2, 1, 1), 2, base_channels=2, norm=norm, num_groups=groups)   # groups 1 or None
    ...                                         # random multiples of 1/8, two batches for the running statistics
    model.eval()
    torch.save(model, "network_{norm}.pt")
    torch.save(model.state_dict(), "state_dict_{norm}.pt")
    outputs["network_{norm}"] = model.double()(normal(2, 3, 40, 40, seed=7).double())

    stage = ERStage(2, 2, 3, block="basic", norm=norm, num_groups=groups)       # as above
    stage.train(mode == "train")
    program = torch.export.export(stage, (normal(2, 2, 5, 4, seed=8),))
    torch.export.save(program, "program_{norm}_{mode}.pt2")
    outputs["program_{norm}_{mode}"] = stage(normal(2, 2, 5, 4, seed=8))         # and the statistics after it
    torch.save(outputs, "outputs.pt")

without the program of norm="batch" in training, which that version could not load itself. Each is packed by gzip,
as most of such a file is padding; `normal` is `normal` below.
"""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from path_cases import NORMS
from torch import Tensor, nn

from ernet_fast import ERShortcut
from ernet_fast.models import ERResNet

FOLDER = Path(__file__).parents[1] / "data_before"
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums in another order
SINGLE = {"rtol": 1e-5, "atol": 1e-5}  # float32


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unpacked(name: str) -> io.BytesIO:
    return io.BytesIO(gzip.decompress((FOLDER / f"{name}.gz").read_bytes()))


def outputs() -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(unpacked("outputs.pt"), weights_only=True)
    return found


def empty_network(norm: str) -> ERResNet:
    groups = 1 if norm == "group" else None
    return ERResNet("basic", (3, 2, 1, 1), 2, base_channels=2, norm=norm, num_groups=groups)


def check(network: nn.Module, norm: str) -> None:
    """In evaluation, fused and not."""
    network.double().eval()
    images = normal(2, 3, 40, 40, seed=7).double()
    for fused in (True, False):
        network.set_fused(fused)
        torch.testing.assert_close(network(images), outputs()[f"network_{norm}"], **EXACT)


@pytest.mark.parametrize("norm", NORMS)
def test_network_pickled_whole(norm: str) -> None:
    network = torch.load(unpacked(f"network_{norm}.pt"), weights_only=False)
    assert not network.training
    for module in network.modules():
        if isinstance(module, ERShortcut):
            assert (module.statistics is None) == (norm == "group")
            assert module.eps == 1e-5 and module.momentum == 0.1
    check(network, norm)


@pytest.mark.parametrize("norm", NORMS)
def test_network_pickled_whole_trains_on(norm: str) -> None:
    """As the same state in a network made now."""
    old = torch.load(unpacked(f"network_{norm}.pt"), weights_only=False).double().train()
    new = empty_network(norm).double()
    new.load_state_dict(old.state_dict())
    images = normal(3, 3, 40, 40, seed=9).double()
    for network in (old, new):
        network(images).square().sum().backward()
    for (name, one), other in zip(old.named_parameters(), new.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    torch.testing.assert_close(dict(old.state_dict()), dict(new.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_state_dict(norm: str) -> None:
    state: dict[str, Any] = torch.load(unpacked(f"state_dict_{norm}.pt"), weights_only=True)
    network = empty_network(norm)
    assert list(network.state_dict()) == list(state)  # names in the same order
    assert {n: v.shape for n, v in network.state_dict().items()} == {n: v.shape for n, v in state.items()}
    network.load_state_dict(state, strict=True)
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name]), name
    check(network, norm)


@pytest.mark.parametrize(("norm", "mode"), [("batch", "eval"), ("group", "eval"), ("group", "train")])
def test_exported_program(norm: str, mode: str) -> None:
    program = torch.export.load(unpacked(f"program_{norm}_{mode}.pt2"))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "ernet.weighted_sum.default" in names
    module, expected = program.module(), outputs()
    torch.testing.assert_close(module(normal(2, 2, 5, 4, seed=8)), expected[f"program_{norm}_{mode}"], **SINGLE)
    if mode == "eval":
        return
    prefix = f"program_{norm}_train."
    updated = {name.removeprefix(prefix): value for name, value in expected.items() if name.startswith(prefix)}
    assert updated
    state = module.state_dict()
    for name, value in updated.items():
        torch.testing.assert_close(state[name], value, **SINGLE)
