"""Optimiser and learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from ernet_fast.models.weights import is_shortcut_entry
from ernet_fast.train.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD with Nesterov momentum; weights of one dimension (biases, normalisation) and ER weights do not
    decay.

    The ER weights scale shortcuts and start at 1; they are [L, C] but belong with the normalisation weights.
    """
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (others if parameter.ndim < 2 or is_shortcut_entry(name) else decaying).append(parameter)
    pairs = ((decaying, config.weight_decay), (others, 0.0))
    groups = [{"params": parameters, "weight_decay": decay} for parameters, decay in pairs if parameters]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)
    return torch.optim.AdamW(groups, lr=config.lr)


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if loaded moments are of other parameters: torch would fail, or broadcast, at the first step."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameter.shape:
                raise ValueError(f"{name} is {list(value.shape)}, the parameter {list(parameter.shape)}")


def cosine_factor(total_steps: int, warmup_steps: int) -> Callable[[int], float]:
    """Learning rate as a share of the highest: rises linearly over `warmup_steps`, then falls as half a cosine to 0."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    return factor


def build_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int) -> LRScheduler:
    """Schedule that is advanced after every optimiser step."""
    total = config.epochs * steps_per_epoch
    if config.schedule == "one-cycle":
        # OneCycleLR forbids a step beyond `total_steps`; the last call to step() of a run is that one.
        return OneCycleLR(optimizer, max_lr=config.lr, total_steps=total + 1)
    if config.schedule == "constant":
        return LambdaLR(optimizer, lambda step: 1.0)
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total // 2)
    return LambdaLR(optimizer, cosine_factor(total, warmup))
