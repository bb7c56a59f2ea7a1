"""The path of a stage: which one, why, and that it is chosen once for all blocks of a forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from path_cases import CHANNELS, assert_same, maps, stage, step
from stage_cases import step_by_step
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from ernet_fast import ERShortcut, ERStage, _backend, fold_for_inference
from ernet_fast.er import operators
from ernet_fast.er import stage as stages
from ernet_fast.er.stage import Choice, Path, StageMaps


def choices(made: nn.Module, x: Tensor) -> list[Choice]:
    """The path chosen in each stage of a forward pass of `made`, which is run."""
    found: list[Choice] = []
    choose = stages.choose

    def recorded(*args: object, **options: object) -> Choice:
        found.append(choose(*args, **options))
        return found[-1]

    with mock.patch.object(stages, "choose", recorded):
        made(x)
    return found


def edited(edit: Callable[[ERStage], object], norm: str = "batch") -> ERStage:
    made = stage(norm)
    edit(made)
    return made


def subclass_of_relu(made: ERStage) -> None:
    made[2].relu = type("MyReLU", (nn.ReLU,), {})()


def replaced_forward(made: ERStage) -> None:
    made[1].shortcut.forward = made[1].shortcut.forward


def other_eps(made: ERStage) -> None:
    made[2].shortcut.eps = 1e-3


def other_kind_of_norm(made: ERStage) -> None:
    made[2].shortcut = ERShortcut(CHANNELS, 2, norm="group", num_groups=2).double()


def hook(target: str) -> Callable[[ERStage], object]:
    return lambda made: made.get_submodule(target).register_forward_hook(lambda *_: None)


def block_with_instance_norm(made: ERStage) -> None:
    made[2].bn2 = nn.InstanceNorm2d(CHANNELS)


CASES: dict[str, tuple[Callable[[], nn.Module], Path, str]] = {
    "batch": (lambda: stage(), Path.BLOCK_OPERATOR, "compiled operators for the CPU"),
    "eval": (lambda: stage().eval(), Path.BLOCK_OPERATOR, "compiled operators for the CPU"),
    "frozen": (lambda: stage().requires_grad_(False), Path.BLOCK_OPERATOR, "compiled operators for the CPU"),
    "bottleneck": (lambda: stage(block="bottleneck"), Path.BLOCK_OPERATOR, "compiled operators for the CPU"),
    "instance norm in a branch": (
        lambda: edited(block_with_instance_norm), Path.BLOCK_OPERATOR, "compiled operators for the CPU",
    ),
    "hook on a convolution": (lambda: edited(hook("2.conv2")), Path.BLOCK_OPERATOR, "compiled operators for the CPU"),
    "hook on a block": (lambda: edited(hook("2")), Path.BLOCK_OPERATOR, "compiled operators for the CPU"),
    "group": (lambda: stage("group"), Path.BLOCK_OPERATOR, "compiled operators for the CPU"),
    "another eps": (lambda: edited(other_eps), Path.TRACEABLE, "differ in eps"),
    "fused=False": (lambda: stage(fused=False), Path.MODULES, "fused=False"),
    "fused=False, group": (lambda: stage("group", fused=False), Path.MODULES, "fused=False"),
    "folded": (lambda: fold_for_inference(stage().eval()), Path.MODULES, "folded for inference"),
    "norms that differ": (lambda: edited(other_kind_of_norm), Path.MODULES, "normalise in different ways"),
    "hook on a shortcut": (lambda: edited(hook("2.shortcut")), Path.MODULES, "the ERShortcut has hooks"),
    "hook on statistics": (
        lambda: edited(hook("2.shortcut.statistics")), Path.MODULES, "the BatchNorm of a shortcut has hooks",
    ),
    "hook on a ReLU": (lambda: edited(hook("2.relu")), Path.MODULES, "the ReLU has hooks"),
    "subclass": (lambda: edited(subclass_of_relu), Path.MODULES, "is a MyReLU, not ReLU"),
    "replaced forward": (lambda: edited(replaced_forward), Path.MODULES, "has a forward of its own"),
    "pruning": (
        lambda: edited(lambda m: prune.random_unstructured(m[2].shortcut, "weight", 0.5)), Path.MODULES, "has hooks"
    ),
    "parametrised": (
        lambda: edited(lambda m: parametrizations.weight_norm(m[2].shortcut)), Path.MODULES, "is a Parametrized"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_path_and_reason(case: str) -> None:
    """As `ERStage.choice` says beforehand, and once in a forward pass."""
    build, path, reason = CASES[case]
    made, x = build(), maps()
    said = made.choice(x)
    found = choices(made, x)
    assert len(found) == 1
    assert found[0] == said
    assert said.path is path
    assert reason in said.reason
    assert said.group is None


def test_hook_on_the_last_norm_of_a_block() -> None:
    """It is called as it is, and its output is the map; the rest stays fused or not, but hooks run and values agree."""
    fused, naive = edited(hook("2.bn2")), edited(hook("2.bn2"))
    naive.fused = False
    assert_same(step(fused, maps()), step(naive, maps()))
    assert fused.choice(maps()) == choices(fused, maps())[0]


def test_path_of_one_operator_a_step() -> None:
    with step_by_step():
        made = stage()
        assert made.choice(maps()).path is Path.COMPOSED
        found = step(made, maps())
    assert_same(found, step(stage(fused=False), maps()))


def test_no_compiled_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "COMPILED", False)
    monkeypatch.setattr(_backend, "warn_fallback_once", lambda: None)
    made = stage()
    choice = made.choice(maps())
    assert choice.path is Path.MODULES
    assert "no compiled operators" in choice.reason
    assert_same(step(made, maps()), step(stage(fused=False), maps()))


def test_transforms_and_tracers() -> None:
    made, x = stage().eval(), maps()
    seen: list[Choice] = []
    torch.func.vmap(lambda v: seen.append(made.choice(v[None])) or v)(x)
    with forward_ad.dual_level():
        seen.append(made.choice(x))
    torch.jit.trace(lambda v: seen.append(made.choice(v)) or v * 2, x, check_trace=False)
    assert all(choice.path is Path.MODULES for choice in seen)
    for choice, word in zip(seen, ("torch.func", "forward-mode AD", "torch.jit.trace"), strict=True):
        assert word in choice.reason


class MyTensor(Tensor):
    """A subclass that changes nothing."""


def test_other_inputs() -> None:
    made = stage().eval()
    x = maps()
    subclassed = choices(made, x.as_subclass(MyTensor))
    assert [choice.path for choice in subclassed] == [Path.MODULES]
    assert "MyTensor, a subclass of torch.Tensor" in subclassed[0].reason
    empty = choices(made, x[:0])
    assert empty == [Choice(Path.MODULES, "the maps are empty")]
    on_meta = copy.deepcopy(made).to("meta")
    choice = on_meta.choice(x.to("meta"))
    assert (choice.path, "no operators for meta devices" in choice.reason) == (Path.MODULES, True)
    single = stage(blocks=1)
    assert single.choice(x) == Choice(Path.MODULES, "the stage has no ER block")


def test_global_hooks() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        choice = stage().choice(maps())
    finally:
        handle.remove()
    assert choice.path is Path.MODULES
    assert "is called with hooks that are registered for all modules" in choice.reason


def test_choice_runs_and_changes_nothing() -> None:
    made = stage()
    state = copy.deepcopy(made.state_dict())
    made.choice(maps())
    torch.testing.assert_close(dict(made.state_dict()), dict(state), rtol=0, atol=0)


def test_a_hook_that_comes_during_a_pass_waits_for_the_next() -> None:
    """The path holds for a forward pass and its backward pass, whatever is registered meanwhile."""
    made, naive = stage(), stage(fused=False)
    shortcut, counts = made[3].shortcut, []

    def register(*_: object) -> None:
        if not shortcut._forward_hooks:
            shortcut.register_forward_hook(lambda *_: counts.append(1))

    made[1].register_forward_hook(register)
    assert_same(step(made, maps()), step(naive, maps()))
    assert counts == []
    assert_same(step(made, maps(1)), step(naive, maps(1)))
    assert counts == [1]


def test_debug_log_names_the_path(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="ernet_fast.er"):
        stage()(maps())
        edited(other_eps)(maps())
    assert "one operator a block each way (compiled operators for the CPU)" in caplog.records[0].getMessage()
    assert "the shortcuts of the stage differ in eps" in caplog.records[1].getMessage()


def test_blocks_must_come_as_announced() -> None:
    made = stage().eval()
    x_0 = maps(size=(5, 4)).relu()
    shortcuts = [block.shortcut for block in list(made)[1:]]
    for path_of in (lambda: StageMaps(fused=True), lambda: StageMaps(fused=False)):
        with torch.no_grad():
            kept = path_of()
            kept.start(x_0, shortcuts)
            with pytest.raises(ValueError, match=r"weights for 2 earlier maps of 4 channels; got 1 maps"):
                kept.add(x_0, made[1].bn2, shortcuts[1])
    one_more = StageMaps(fused=True)
    with torch.no_grad():
        one_more.start(x_0, shortcuts[:1])
        one_more.add(x_0, made[1].bn2, shortcuts[0])
        with pytest.raises(ValueError, match="started with shortcuts for 2 maps; this is one more"):
            one_more.add(x_0, made[2].bn2, shortcuts[1])
        other = StageMaps(fused=True)
        other.start(x_0, shortcuts)
        with pytest.raises(ValueError, match="not the shortcut that map 1 of the stage was started with"):
            other.add(x_0, made[1].bn2, copy.deepcopy(shortcuts[0]))
