"""The networks of `ernet-fast bench model`: the ER-ResNet, its naive composition, the plain ResNet, DenseNet-121."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from ernet_fast import models
from ernet_fast.models import ERResNet, optimize_for_inference
from ernet_fast.models.depths import LAYERS
from ernet_fast.reference.er_network import naive_er_resnet, state_dict_from_fused
from ernet_fast.reference.rival_networks import DenseNet121, PlainResNet

MODELS = tuple(f"er_resnet{depth}" for depth in LAYERS)
CLASSES = 1000


@dataclass(frozen=True)
class Network:
    """A contestant.

    Attributes:
        key: short, for files.
        name: for people.
        model: in training mode, channels-last, on its device.
        for_inference: makes what is run in evaluation, prepared as its users would; None for nothing of its own.
        twin: True if it computes what the ER-ResNet does.
        compiled: True if its first step compiles, for minutes.
    """

    key: str
    name: str
    model: Any
    for_inference: Callable[[nn.Module], Any] | None
    twin: bool = False
    compiled: bool = False

    @property
    def parameters(self) -> int:
        """The number of its parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def networks(model: str, device: torch.device, compiled: bool, base_channels: int = 64) -> list[Network]:
    """All contestants, the plain ResNet first; twins of the ER-ResNet have its weights."""
    depth = int(model.removeprefix("er_resnet"))
    torch.manual_seed(0)
    er = getattr(models, model)(CLASSES, base_channels=base_channels)
    lean = copy.deepcopy(er)
    lean.set_memory("lean")
    naive = naive_er_resnet(depth, CLASSES, base_channels=base_channels)
    naive.load_state_dict(state_dict_from_fused(er.state_dict()))
    made: list[tuple[str, str, nn.Module, Callable[[nn.Module], Any] | None]] = [
        ("plain", f"ResNet-{depth}", PlainResNet(depth, CLASSES, base_channels=base_channels), folded),
        ("naive", f"naive ER-ResNet-{depth}", naive, nn.Module.eval),
        ("er", f"ER-ResNet-{depth}", er, _optimized),
        ("lean", f"ER-ResNet-{depth}, memory lean", lean, None),
        ("densenet", "DenseNet-121", DenseNet121(CLASSES), folded),
    ]
    found = []
    for key, name, module, prepare in made:
        module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        found.append(Network(key, name, module, prepare, twin=module in (er, naive, lean)))
    if compiled:
        copied = copy.deepcopy(naive)
        graph = torch.compile(copied, dynamic=False)
        after_naive = Network(
            "compiled", f"naive ER-ResNet-{depth}, torch.compile", graph, _compiled, twin=True, compiled=True
        )
        found.insert(2, after_naive)
    return found


def folded(model: nn.Module) -> nn.Module:
    """A copy in evaluation with each BatchNorm that follows a convolution folded into it, by torch.fx."""
    made: nn.Module = fuse(copy.deepcopy(model).eval())
    return made


def _optimized(model: nn.Module) -> nn.Module:
    assert isinstance(model, ERResNet)
    return optimize_for_inference(copy.deepcopy(model).eval())


def _compiled(model: Any) -> Any:
    return torch.compile(copy.deepcopy(model._orig_mod).eval(), dynamic=False)


def random_batch(batch: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images [batch, 3, size, size], channels-last, and labels."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn((batch, 3, size, size), generator=generator).to(device)
    labels = torch.randint(0, CLASSES, (batch,), generator=generator).to(device)
    return images.contiguous(memory_format=torch.channels_last), labels


def training_of(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """A training step - forward, cross-entropy, backward, SGD with momentum - and its optimiser."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step, optimizer


def inference_of(network: Network, images: Tensor) -> Callable[[], Tensor] | None:
    """A forward pass as its users would deploy it."""
    if network.for_inference is None:
        return None
    model = network.for_inference(network.model)
    return torch.inference_mode()(functools.partial(model, images))
