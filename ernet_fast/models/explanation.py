"""Which path each ER stage of a model takes for an input, and why."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ernet_fast.models.stage import ERStage


class StageExplanation(NamedTuple):
    """The path of one stage."""

    name: str  # the stage's name in the model, "" for the model itself
    path: str  # how the epilogues of its blocks are computed
    reason: str  # why this path and no faster one

    def __str__(self) -> str:
        return f"{self.name or 'stage'}: {self.path} ({self.reason})"


class Explanation(tuple[StageExplanation, ...]):
    """One entry a stage; as a string, one line a stage."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def explain(model: nn.Module, x: Tensor) -> Explanation:
    """The path of every `ERStage` in `model` for an input like `x`, with the reason, as a forward pass would choose it.

    Nothing is computed or updated. Modes that hold where this is called count: autocast, transforms of `torch.func`,
    `torch.compiler`. A forward pass logs the same at DEBUG to the logger "ernet_fast.er".

    Args:
        model: a network, in the mode of interest (`train()`, `eval()`), on the device of `x`.
        x: an input of the model, or of anything with its batch size and device.

    Returns:
        One `StageExplanation` a stage, in the order of `model.named_modules()`; print it to read it.

    Raises:
        TypeError: `model` is no module, or `x` no tensor.
        ValueError: `model` holds no `ERStage`.
        RuntimeError: a stage that could not run at all, such as statistics over processes on an unfused path.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor like an input of the model, got {type(x).__name__}")
    stages = {name: module for name, module in model.named_modules() if isinstance(module, ERStage)}
    if not stages:
        raise ValueError(f"the {type(model).__name__} holds no ERStage.")
    choices = {name: stage.choice(x) for name, stage in stages.items()}
    return Explanation(StageExplanation(name, choice.path.value, choice.reason) for name, choice in choices.items())
