"""Stages with hooked, parametrised, subclassed or replaced modules compute what the naive composition of them does.

An epilogue stands in for modules that are never called; none of them may be passed over that does more in a call than
its class says.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from path_cases import CHANNELS, NORMS, assert_same, count_calls, maps, stage, step
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations, parametrize, prune

from ernet_fast import ERShortcut, ERStage
from ernet_fast.er.stage import Path

EPILOGUE = ("2.bn2", "2.shortcut", "2.relu")
INSIDE = ("2.bn1", "2", "2.conv2", "0.bn2", "0.relu", "0.downsample", "0.downsample.1", "0")
HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)


def without_inplace(module: nn.Module) -> None:
    """What PyTorch itself asks for under full backward hooks: no ReLU that overwrites another module's output."""
    for relu in module.modules():
        if isinstance(relu, nn.ReLU):
            relu.inplace = False


def compare(edit: Callable[[ERStage], Any], norm: str, *, training: bool = True, passes: int = 2) -> tuple[Any, Any]:
    """Training steps of an edited fused stage and of an edited naive one; returns what `edit` did of both."""
    fused, naive = stage(norm), stage(norm, fused=False)
    left = edit(fused), edit(naive)
    fused.train(training), naive.train(training)
    for seed in range(passes):
        assert_same(step(fused, maps(seed)), step(naive, maps(seed)))
    return left


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("register", HOOKS)
def test_hooks_run_once_a_call(register: str, norm: str) -> None:
    names = (*EPILOGUE, *INSIDE) if "backward" not in register else (*EPILOGUE, "2.bn1", "0.bn2", "0.downsample")
    for name in names:

        def edit(stage: ERStage, name: str = name) -> dict[str, int]:
            without_inplace(stage)
            return count_calls(stage, (name,), register)

        calls = 2 if name.endswith("relu") else 1  # a block of two convolutions has one ReLU, called twice
        found, expected = compare(edit, norm, passes=1)
        assert found == expected == {name: calls}


@pytest.mark.parametrize("register", HOOKS[:2])
def test_hooks_of_the_statistics(register: str) -> None:
    found, expected = compare(lambda stage: count_calls(stage, ("2.shortcut.statistics",), register), "batch", passes=1)
    assert found == expected == {"2.shortcut.statistics": 1}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("target", ["2.bn2", "2.shortcut", "2.relu", "0.bn2", "2.bn1"])
def test_hooks_that_change_values(target: str, norm: str) -> None:
    def edit(stage: ERStage) -> None:
        stage.get_submodule(target).register_forward_hook(lambda module, inputs, output: output * 0.5 - 0.1)

    compare(edit, norm)


@pytest.mark.parametrize("norm", NORMS)
def test_hook_that_comes_and_goes(norm: str) -> None:
    """The path is chosen anew in each forward pass."""
    edited, naive = stage(norm), stage(norm, fused=False)
    assert_same(step(edited, maps()), step(naive, maps()))
    handle = edited[1].bn2.register_forward_hook(lambda module, inputs, output: output + 1)
    twin = naive[1].bn2.register_forward_hook(lambda module, inputs, output: output + 1)
    assert_same(step(edited, maps(1)), step(naive, maps(1)))
    handle.remove(), twin.remove()
    assert_same(step(edited, maps(2)), step(naive, maps(2)))
    assert edited.choice(maps()).path is not Path.MODULES


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "register",
    ["register_module_forward_hook", "register_module_forward_pre_hook", "register_module_full_backward_hook"],
)
def test_global_hooks(register: str, norm: str) -> None:
    """Hooks of all modules see every module that has a part in the computation, but for the BatchNorm of a shortcut."""
    seen: dict[bool, list[str]] = {}
    found = {}
    for fused in (True, False):
        made = stage(norm, fused=fused)
        without_inplace(made)
        names = {module: name for name, module in made.named_modules()}
        order = seen.setdefault(fused, [])
        handle = getattr(nn_module, register)(lambda module, *_, o=order, n=names: o.append(n[module]))
        try:
            found[fused] = step(made, maps())
        finally:
            handle.remove()
    assert_same(found[True], found[False])
    assert seen[True] == seen[False]
    for name in ("3.bn2", "3.shortcut"):
        assert seen[True].count(name) == 1


def random_half(module: nn.Module) -> None:
    torch.manual_seed(5)
    prune.random_unstructured(module, "weight", amount=0.5)


class Cubed(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight**3


CHANGED_WEIGHTS = {
    "pruning": random_half,
    "parametrize": lambda module: parametrize.register_parametrization(module, "weight", Cubed()),
    "weight_norm": lambda module: parametrizations.weight_norm(module, "weight"),
    "spectral_norm": lambda module: (torch.manual_seed(0), parametrizations.spectral_norm(module, "weight")),
    "weight_norm by a hook": lambda module: nn.utils.weight_norm(module, "weight"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("change", CHANGED_WEIGHTS)
@pytest.mark.parametrize("target", ["1.bn1", "1.bn2", "1.shortcut", "0.downsample.1"])
def test_weights_that_a_call_provides(target: str, change: str, norm: str) -> None:
    """Also after an optimizer's steps, and after a state dict with other weights has been loaded."""
    made = [stage(norm), stage(norm, fused=False)]
    for one in made:
        CHANGED_WEIGHTS[change](one.get_submodule(target))
    for seed in range(2):
        found, expected = (step(one, maps(seed)) for one in made)
        assert_same(found, expected)
        for one in made:
            torch.optim.SGD(one.parameters(), 1e-2).step()
    state = {name: value * 2 if value.is_floating_point() else value for name, value in made[1].state_dict().items()}
    for one in made:
        one.load_state_dict(state)
        one.eval()
    assert_same(step(made[0], maps(2)), step(made[1], maps(2)))


class Halved(ERShortcut):
    """As somebody might write it: another sum."""

    def forward(self, xs: Any, fused: bool | None = None, relu: bool | None = None) -> Tensor:
        return super().forward(xs, fused=fused, relu=relu) * 0.5


class Named(ERShortcut):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [Halved, Named])
def test_subclass_of_a_shortcut(kind: type[ERShortcut], norm: str) -> None:
    def edit(stage: ERStage) -> None:
        old = stage[2].shortcut
        new = kind(CHANNELS, 2, norm=norm, num_groups=old.num_groups).double()
        new.load_state_dict(old.state_dict())
        stage[2].shortcut = new

    compare(edit, norm)


class _GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return dy.clamp_min(0) * (x > 0)


class GuidedReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _GuidedReLU.apply(x)


def replace_relus(module: nn.Module, make: Callable[[], nn.Module]) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, make())
        else:
            replace_relus(child, make)


class SubclassedReLU(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 0.1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("make", [lambda: nn.LeakyReLU(0.5), nn.Identity, GuidedReLU, nn.SiLU, SubclassedReLU])
def test_every_relu_replaced(make: Callable[[], nn.Module], norm: str) -> None:
    """Also by hand, since fused and naive composition share the code that calls a replaced ReLU."""
    compare(lambda stage: replace_relus(stage, make), norm)
    made = stage(norm, blocks=2)
    replace_relus(made, make)
    activation, x = make(), maps()
    block, first = made[1], made[0]
    with torch.no_grad():
        x_0 = activation(first.bn2(first.conv2(activation(first.bn1(first.conv1(x))))) + first.downsample(x))
        z = block.conv2(activation(block.bn1(block.conv1(x_0))))
        if norm == "group":
            normalised = nn.functional.group_norm(x_0, 2, eps=1e-5)
        else:
            normalised = nn.functional.batch_norm(x_0, None, None, training=True)
        expected = activation(block.bn2(z) + block.shortcut.weight.view(1, -1, 1, 1) * normalised)
        torch.testing.assert_close(made(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("target", ["2.bn2", "2.bn1", "2.shortcut", "2.relu", "2", "0.downsample"])
def test_replaced_forward(target: str, norm: str) -> None:
    """As offloading tools do: a `forward` on the instance that moves weights in, and calls the old one."""

    def edit(stage: ERStage) -> list[str]:
        module, calls = stage.get_submodule(target), []
        old = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append(target)
            return old(*args, **kwargs)

        module.forward = forward
        return calls

    found, expected = compare(edit, norm, passes=1)
    assert len(found) == len(expected) == (2 if target.endswith("relu") else 1)


@pytest.mark.parametrize("kind", [nn.InstanceNorm2d, nn.GroupNorm])
@pytest.mark.parametrize("norm", NORMS)
def test_other_normalisation_ends_a_branch(kind: type[nn.Module], norm: str) -> None:
    """It runs as it is, and the fused path serves the rest."""

    def edit(stage: ERStage) -> ERStage:
        stage[2].bn2 = (nn.GroupNorm(2, CHANNELS) if kind is nn.GroupNorm else kind(CHANNELS, affine=True)).double()
        return stage

    fused, _ = compare(edit, norm)
    assert fused.choice(maps()).path is not Path.MODULES


SHARDED = """
import copy, sys, warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
sys.path.insert(0, {folder!r})
from path_cases import assert_same, maps, stage, step

dist.init_process_group("gloo", init_method="file://{file}", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
for norm in ("batch", "group"):
    sharded, naive = stage(norm), stage(norm, fused=False)
    for block in list(sharded)[1:]:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for seed in range(2):
        found = {{k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in step(sharded, maps(seed)).items()}}
        assert_same(found, step(naive, maps(seed)))
    print(norm, "ok")
dist.destroy_process_group()
"""


def test_fully_sharded_blocks(tmp_path: Any) -> None:
    """FSDP2 gathers a block's parameters in the block's pre-hook, and a stage must not read them before."""
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    script = SHARDED.format(folder=os.path.dirname(__file__), file=tmp_path / "store")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["batch", "ok", "group", "ok"]


def test_copies_of_edited_stages_stay_independent() -> None:
    """A hook of the copy is none of the original's."""
    original = stage()
    copied = copy.deepcopy(original)
    copied[2].shortcut.register_forward_hook(lambda module, inputs, output: output + 1)
    assert copied.choice(maps()).path is Path.MODULES
    assert original.choice(maps()).path is Path.BLOCK_OPERATOR
