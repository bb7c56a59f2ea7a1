"""torch.fx, torch.jit and stages: graphs of PyTorch's operators that compute the same, or an error with the way out."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from path_cases import CHANNELS, NORMS, assert_same, maps, network, stage, step
from torch import Tensor, nn

from ernet_fast import ERShortcut, ERStage, fold_for_inference

FUSED = pytest.mark.parametrize("fused", [True, False])
IMAGES = (2, 3, (33, 32))
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@FUSED
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_symbolic_trace(training: bool, norm: str, fused: bool) -> None:
    """Trained and evaluated through the graph: values, gradients and statistics are those of the network."""
    made = network(norm, fused=fused).train(training)
    naive = copy.deepcopy(made)
    naive.set_fused(False)
    traced = torch.fx.symbolic_trace(made)
    traced.train(training)
    for seed in range(2):
        found, expected = step(traced, maps(seed, *IMAGES)), step(naive, maps(seed, *IMAGES))
        assert_same(found, expected)
    assert not [node for node in traced.graph.nodes if "ernet" in str(node.target)]  # PyTorch's operators alone
    torch.testing.assert_close(traced(maps(4, 5, 3, (40, 33))), naive(maps(4, 5, 3, (40, 33))), **CLOSE)


@FUSED
@pytest.mark.parametrize("leaf", [ERStage, ERShortcut])
@pytest.mark.parametrize("norm", NORMS)
def test_leaf_modules(norm: str, leaf: type[nn.Module], fused: bool) -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, leaf) or super().is_leaf_module(module, name)

    made = network(norm, fused=fused).eval()
    traced = torch.fx.GraphModule(made, Tracer().trace(made))
    assert any(isinstance(made.get_submodule(str(n.target)), leaf) for n in traced.graph.nodes if n.op == "call_module")
    assert_same(step(traced, maps(0, *IMAGES)), step(made, maps(0, *IMAGES)))


@pytest.mark.parametrize("norm", NORMS)
def test_folded_network(norm: str) -> None:
    folded = fold_for_inference(network(norm).eval())
    traced = torch.fx.symbolic_trace(folded)
    torch.testing.assert_close(traced(maps(0, *IMAGES)), folded(maps(0, *IMAGES)), **CLOSE)


def test_edited_relus_are_in_the_graph() -> None:
    """Quantisation and the like rewrite module calls: each ReLU must be one."""
    made = stage(blocks=3).eval()
    for block in made:
        block.relu = nn.LeakyReLU(0.3)
    traced = torch.fx.symbolic_trace(made)
    assert [str(n.target) for n in traced.graph.nodes if str(n.target).endswith("relu")].count("2.relu") == 2
    assert_same(step(traced, maps()), step(made, maps()))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", ["batch", "group", "folded", "fused=False"])
def test_jit_trace_without_warnings(kind: str, grad: bool) -> None:
    """Nothing of ours makes the trace depend on the example: TracerWarnings would name it."""
    made = network("group" if kind == "group" else "batch", fused=kind != "fused=False", layers=(2, 2, 1, 1)).eval()
    if kind == "folded":
        made = fold_for_inference(made)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(made, maps(0, *IMAGES), check_trace=False)
    for x in (maps(1, *IMAGES), maps(2, 3, 3, (48, 40))):
        torch.testing.assert_close(traced(x), made(x), **CLOSE)
    x = maps(1, *IMAGES).requires_grad_()
    y = maps(1, *IMAGES).requires_grad_()
    if grad:
        traced(x).square().sum().backward(), made(y).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad, **CLOSE)


class Alone(nn.Module):
    """A shortcut whose maps are arguments of their own."""

    def __init__(self, shortcut: ERShortcut) -> None:
        super().__init__()
        self.shortcut = shortcut

    def forward(self, *xs: Tensor) -> Tensor:
        y: Tensor = self.shortcut(xs)
        return y


@pytest.mark.parametrize("norm", NORMS)
def test_jit_trace_of_a_stage_and_of_a_shortcut(norm: str) -> None:
    made = stage(norm, 3).eval()
    traced = torch.jit.trace(made, maps())
    torch.testing.assert_close(traced(maps(3, 2)), made(maps(3, 2)), **CLOSE)
    shortcut = made[2].shortcut
    alone = torch.jit.trace(Alone(shortcut), tuple(maps(seed) for seed in range(3)))
    xs = [maps(seed, 2) for seed in (4, 5, 6)]
    torch.testing.assert_close(alone(*xs), shortcut(xs), **CLOSE)


@FUSED
def test_jit_script_says_what_to_use(fused: bool) -> None:
    made = stage(fused=fused)
    for module in (made, nn.Sequential(made), network(fused=fused), nn.Sequential(nn.Conv2d(3, CHANNELS, 1), made)):
        with pytest.raises(TypeError, match=r"cannot compile an ER(Stage|-ResNet).*torch\.jit\.trace"):
            torch.jit.script(module)
