"""Stages that somebody has edited, their naive twins, and a comparison of all that a training step leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ernet_fast.models import ERResNet, ERStage

NORMS = ("batch", "group")
CHANNELS = 4
# Sums of at most a few thousand float64 products in a network of a dozen blocks, whose normalisations amplify rounding.
TOLERANCE = 1e-9
ROUNDING = 1e4 * torch.finfo(torch.float64).eps
"""Of the largest gradient: what is left of one whose terms cancel."""


def by_norm(norm: str) -> dict[str, Any]:
    return {"norm": norm, "num_groups": 2 if norm == "group" else None}


def randomise(model: nn.Module) -> None:
    """Parameters and running statistics far from their initial values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.4 if parameter.dim() > 2 else 0.8))
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + (0.5 if name.endswith("var") else -0.5))


def stage(norm: str = "batch", blocks: int = 4, *, fused: bool = True, **options: Any) -> ERStage:
    """In float64; equal arguments give equal parameters."""
    made = ERStage(
        CHANNELS, CHANNELS, blocks, **{"block": "basic", "stride": 2, "fused": fused, **by_norm(norm)} | options
    )
    made.double()
    randomise(made)
    return made


def network(norm: str = "batch", *, fused: bool = True, layers: tuple[int, ...] = (2, 3, 1, 1)) -> ERResNet:
    torch.manual_seed(0)
    made = ERResNet("basic", layers, 3, base_channels=CHANNELS, fused=fused, **by_norm(norm)).double()
    for module in made.modules():
        if isinstance(module, ERStage):
            randomise(module)
    return made


def maps(seed: int = 0, batch: int = 3, channels: int = CHANNELS, size: tuple[int, int] = (9, 7)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64)


def weighted(y: Tensor) -> Tensor:
    """A loss that weighs every value differently."""
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()


def step(model: nn.Module, x: Tensor, call: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """Output, gradients and buffers of one forward and backward pass of `call`, by default `model` itself."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = (model if call is None else call)(x)
    weighted(y).backward()
    assert x.grad is not None
    found = {"y": y.detach().clone(), "x": x.grad}
    found |= {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: b.clone() for name, b in model.named_buffers()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max((float(value.norm()) for name, value in expected.items() if name.endswith("grad")), default=0.0)
    for name, value in expected.items():
        error = float((found[name].double() - value.double()).norm())
        slack = ROUNDING * largest if name.endswith("grad") else 0.0
        assert error <= TOLERANCE * float(value.double().norm()) + slack, f"{name}: off by {error}"


def count_calls(module: nn.Module, names: Iterable[str], register: str) -> dict[str, int]:
    """Calls of a hook on each named submodule; `register` is the method, such as "register_forward_hook"."""
    counts = dict.fromkeys(names, 0)

    def hook_of(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[name] += 1

        return hook

    for name in counts:
        getattr(module.get_submodule(name), register)(hook_of(name))
    return counts
