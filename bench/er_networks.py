"""The networks whose steps are compared - plain, naive ER, fused ER, also with memory="lean" - and a training step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from this_tree import rival_networks
from torch import Tensor, nn

from ernet_fast import er_resnet18, er_resnet34, er_resnet50, er_resnet101
from ernet_fast.reference.er_network import naive_er_resnet, state_dict_from_fused

FUSED = {18: er_resnet18, 34: er_resnet34, 50: er_resnet50, 101: er_resnet101}


def networks(
    depth: int, device: str = "cpu", names: tuple[str, ...] = ("fused", "plain", "naive"), **kw: Any
) -> dict[str, nn.Module]:
    """The fused, the plain and the naive network, channels-last; the naive one has the weights of the fused."""
    models = {name: network(name, depth, device, **kw) for name in names}
    models["naive"].load_state_dict(state_dict_from_fused(models["fused"].state_dict()))
    return models


def network(name: str, depth: int, device: str = "cpu", **kw: Any) -> nn.Module:
    torch.manual_seed(0)
    if name in ("fused", "lean"):
        model: nn.Module = FUSED[depth](memory="lean" if name == "lean" else "usual", **kw)
    else:
        model = {"plain": rival_networks.PlainResNet, "naive": naive_er_resnet}[name](depth, **kw)
    return model.to(device=device, memory_format=torch.channels_last)


def batch_of(count: int, size: int = 224, device: str = "cpu", num_classes: int = 1000) -> tuple[Tensor, Tensor]:
    """Images [count, 3, size, size], channels-last, and labels."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn((count, 3, size, size), generator=generator).contiguous(memory_format=torch.channels_last)
    return images.to(device), torch.randint(0, num_classes, (count,), generator=generator).to(device)


def training_of(
    model: nn.Module, images: Tensor, labels: Tensor, half: torch.dtype | None = None
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """A step of training of the model, and its optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    return functools.partial(train_step, model, optimizer, images, labels, half), optimizer


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, half: torch.dtype | None = None
) -> None:
    """One step of training: forward (under autocast to `half` if given), loss, backward, update."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, dtype=half, enabled=half is not None):
        loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
