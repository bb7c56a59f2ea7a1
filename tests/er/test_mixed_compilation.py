"""Compiled and eager code in one stage: values, gradients and running statistics of eager code, wherever graphs end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from path_cases import NORMS, assert_same, count_calls, maps, network, stage, step
from torch import Tensor, nn

from ernet_fast import ERStage
from ernet_fast.models.blocks import ERBlock

BACKENDS = ["eager", "aot_eager"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def er_blocks(model: nn.Module) -> list[ERBlock]:
    return [module for module in model.modules() if isinstance(module, ERBlock)]


def compare(build: Callable[[], nn.Module], edit: Callable[[nn.Module], Any], x: Tensor) -> None:
    """Two training steps of a model whose `edit` returns the call to make, None for its own, against an eager twin."""
    model, eager = build(), build()
    call = edit(model)
    for _ in range(2):
        found, expected = step(model, x, call), step(eager, x)
        assert_same(found, expected)


def compiled_blocks(backend: str) -> Callable[[nn.Module], None]:
    def edit(model: nn.Module) -> None:
        for block in er_blocks(model):
            block.compile(backend=backend)

    return edit


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_block_compiled_by_itself(backend: str, norm: str) -> None:
    """Regional compilation."""
    compare(lambda: stage(norm, 3), compiled_blocks(backend), maps())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("compiled", [(1,), (0, 3)])
def test_some_blocks_compiled(compiled: tuple[int, ...], norm: str) -> None:
    def edit(made: ERStage) -> None:
        for index in compiled:
            made[index].compile(backend="eager")

    compare(lambda: stage(norm), edit, maps())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("target", ["2.shortcut", "2.bn2", "2.relu", "0.downsample"])
def test_compiled_module_of_a_block(target: str, norm: str) -> None:
    compare(lambda: stage(norm), lambda made: made.get_submodule(target).compile(backend="eager"), maps())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_block_out_of_the_compiler(backend: str, norm: str) -> None:
    def edit(made: ERStage) -> Any:
        made[1].forward = torch.compiler.disable(made[1].forward)
        return torch.compile(made, backend=backend)

    compare(lambda: stage(norm, 3), edit, maps())


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("limit", [1, 8])
def test_hooks_on_every_block_of_a_compiled_network(limit: int, norm: str) -> None:
    """A hook that reads values ends a graph at each block; dynamo's recompile limit sends the rest to eager code."""

    def edit(model: nn.Module) -> Any:
        seen: list[float] = []
        for block in er_blocks(model):
            block.register_forward_hook(lambda module, inputs, output: seen.append(float(output.detach().mean())))
        return torch.compile(model, backend="eager")

    with torch._dynamo.config.patch(recompile_limit=limit):
        compare(lambda: network(norm, layers=(4, 1, 1, 1)), edit, maps(2, 2, 3, (33, 32)))


@pytest.mark.parametrize("norm", NORMS)
def test_one_stage_eager_in_a_compiled_network(norm: str) -> None:
    def edit(model: nn.Module) -> Any:
        model.layer2.forward = torch.compiler.disable(model.layer2.forward)
        return torch.compile(model, backend="aot_eager")

    compare(lambda: network(norm, layers=(1, 3, 1, 1)), edit, maps(2, 2, 3, (33, 32)))


class Printing(nn.Module):
    """A convolution that says something, which dynamo cannot trace."""

    def __init__(self, conv: nn.Module, said: list[str]) -> None:
        super().__init__()
        self.conv, self.said = conv, said

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        self.said.append("called")
        y: Tensor = self.conv(x)
        return y


class Branching(nn.Module):
    """A convolution whose result depends on a value."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y * 2 if bool(y.detach().mean() > 0) else y


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["print", "branch"])
def test_graph_break_inside_a_branch(kind: str, norm: str) -> None:
    said: list[str] = []

    def build() -> nn.Module:
        made = stage(norm, 3)
        made[1].conv2 = Printing(made[1].conv2, said) if kind == "print" else Branching(made[1].conv2)
        return made

    compare(build, lambda made: torch.compile(made, backend="aot_eager"), maps())
    assert len(said) == (4 if kind == "print" else 0)  # two steps of two models


@pytest.mark.parametrize("norm", NORMS)
def test_graph_break_between_blocks(norm: str) -> None:
    class Broken(ERStage):
        def _blocks(self) -> list[Any]:
            torch._dynamo.graph_break()
            return super()._blocks()

    def edit(made: ERStage) -> Any:
        made.__class__ = Broken
        made[1].register_forward_pre_hook(lambda module, inputs: torch._dynamo.graph_break())
        return torch.compile(made, backend="aot_eager")

    compare(lambda: stage(norm, 3), edit, maps())


@pytest.mark.parametrize("norm", NORMS)
def test_hooks_of_a_compiled_stage_run(norm: str) -> None:
    """Also on modules whose arithmetic an epilogue does."""
    made = stage(norm, 3)
    counts = count_calls(made, ("2.bn2", "2.shortcut", "2.relu", "1"), "register_forward_hook")
    compare(lambda: copy.deepcopy(made), lambda model: torch.compile(model, backend="eager"), maps())
    call = torch.compile(made, backend="eager")
    before = dict(counts)
    call(maps())
    assert {name: counts[name] - before[name] for name in counts} == {
        "2.bn2": 1, "2.shortcut": 1, "2.relu": 2, "1": 1
    }  # fmt: skip


@pytest.mark.parametrize("norm", NORMS)
def test_evaluation_between_training_steps(norm: str) -> None:
    """One compiled model, in both modes and with gradients off and on."""
    model, eager = stage(norm, 3), stage(norm, 3)
    call = torch.compile(model, backend="eager")
    for training in (True, False, True):
        model.train(training), eager.train(training)
        with torch.no_grad():
            torch.testing.assert_close(call(maps(5)), eager(maps(5)), rtol=1e-9, atol=1e-9)
        assert_same(step(model, maps(), call), step(eager, maps()))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("frozen", [False, True])
def test_forward_mode_of_a_compiled_stage(frozen: bool, norm: str) -> None:
    """Also after graphs without a tangent have been compiled: none is used again, and the tangent is not lost."""
    made, x, t = stage(norm, 2).eval().requires_grad_(not frozen), maps(), maps(9)
    call = torch.compile(made, backend="eager")
    naive = stage(norm, 2, fused=False).eval()
    call(x)
    with torch.no_grad():
        call(x)
    _, expected = torch.func.jvp(naive, (x,), (t,))
    _, found = torch.func.jvp(call, (x,), (t,))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(x, t))).tangent
    torch.testing.assert_close(tangent, expected, rtol=1e-9, atol=1e-9)
