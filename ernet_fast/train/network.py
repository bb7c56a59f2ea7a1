"""The network of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ernet_fast import models
from ernet_fast.train.config import TrainConfig

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
    build = getattr(models, config.model)
    names = ("norm", "fused", "block", "base_channels", "num_groups")
    settings: dict[str, Any] = {name: getattr(config, name) for name in names}
    if config.weights is None:
        return build(num_classes, **settings)
    state = models.read_weights(config.weights)
    classes = len(state["fc.weight"]) if "fc.weight" in state else num_classes
    model = build(classes, weights=state, **settings)
    if classes != num_classes:
        model.reset_classifier(num_classes)
    return model
