"""The network of a run, its optimiser and its learning rate."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from ernet_fast import models
from ernet_fast._optional import require
from ernet_fast.models.plain_resnet import build_plain_resnet
from ernet_fast.models.weights import is_shortcut_entry
from ernet_fast.train.config import ER_MODELS, TIMM, TrainConfig

_VECTOR_WIDTH = 16  # float32 values in the widest vector register


def uses_channels_last(config: TrainConfig, device: torch.device) -> bool:
    """Whether activations of a run are stored channels-last on `device`: not on CPUs below 16 base channels.

    In torch 2.13 the backward pass of a channels-last 1x1 convolution of stride 2 with fewer input channels than a
    vector register holds writes beyond its memory.
    """
    return config.channels_last and (device.type != "cpu" or config.base_channels >= _VECTOR_WIDTH)


def build_network(config: TrainConfig, num_classes: int) -> nn.Module:
    """The network that `config` names, with random weights (of torch's generator) or those of `config.weights`.

    Weights with another number of classes bring everything but the classifier, which then starts at random. Errors
    are those of `models.read_weights` and `models.load_torchvision_state_dict`.
    """
    if config.is_timm:
        return _timm_network(config, num_classes)
    names: tuple[str, ...] = ("block", "base_channels")
    if config.model in ER_MODELS:
        names += ("norm", "fused", "memory", "num_groups")
        build: Any = getattr(models, config.model)
    else:
        build = partial(build_plain_resnet, int(config.model.removeprefix("resnet")))
    settings: dict[str, Any] = {name: getattr(config, name) for name in names}
    if config.weights is None:
        return build(num_classes, **settings)
    state = models.read_weights(config.weights)
    classes = len(state["fc.weight"]) if "fc.weight" in state else num_classes
    model = build(classes, weights=state, **settings)
    if classes != num_classes:
        model.reset_classifier(num_classes)
    return model


def _timm_network(config: TrainConfig, num_classes: int) -> nn.Module:
    """A model of timm with random weights, or those of a file of its own, of which the classifier may be another's.

    Raises:
        ValueError: timm has no such model, or the weights do not fit.
    """
    timm = require("timm", extra="timm", purpose=f"model {config.model!r}")
    try:
        model: nn.Module = timm.create_model(config.model.removeprefix(TIMM), pretrained=False, num_classes=num_classes)
    except RuntimeError as error:
        known = ", ".join(ER_MODELS)
        raise ValueError(
            f"model={config.model!r}: {error}; expected {known}, resnet18, ..., or a name of timm."
        ) from None
    if config.weights is not None:
        own, state = model.state_dict(), models.read_weights(config.weights)
        fits = {name: tensor for name, tensor in state.items() if name in own and tensor.shape == own[name].shape}
        missing = [name for name in own if name not in fits]
        head = tuple(f"{name}." for name in _classifier_names(model))
        if any(not name.startswith(head) for name in missing) or not fits:
            raise ValueError(
                f"the weights are of another architecture than {config.model}: they lack {missing[:3]} ..."
            )
        model.load_state_dict(fits, strict=False)
    return model


def _classifier_names(model: Any) -> tuple[str, ...]:
    """Where a timm model keeps its classifier."""
    found = (getattr(model, "default_cfg", None) or {}).get("classifier", "fc")
    return (found,) if isinstance(found, str) else tuple(found)


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, Adam or SGD with Nesterov momentum; weights of one dimension (biases, normalisation) do not decay, nor do
    ER weights [L, C], which scale shortcuts and start at 1 as those of normalisation.
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
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=config.betas)


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if loaded moments are of other parameters: torch would fail, or broadcast, at the first step."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameter.shape:
                raise ValueError(f"{name} is {list(value.shape)}, the parameter {list(parameter.shape)}")


def build_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int) -> LRScheduler:
    """Schedule that is advanced after every optimiser step."""
    total = config.epochs * steps_per_epoch
    if config.schedule == "one-cycle":
        # OneCycleLR forbids a step beyond `total_steps`; the last call to step() of a run is that one.
        return OneCycleLR(optimizer, max_lr=config.lr, total_steps=total + 1)
    if config.schedule == "constant":
        return LambdaLR(optimizer, lambda step: 1.0)
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total // 2)

    def factor(step: int) -> float:
        """Rises linearly over the warm-up, then falls as half a cosine to 0."""
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, total - warmup)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    return LambdaLR(optimizer, factor)
