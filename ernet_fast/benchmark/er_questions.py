"""How fast are ER shortcuts, and a training step with them?"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ernet_fast import er_shortcut_sum, models, reference
from ernet_fast.benchmark.question import OWN, Agreement, Contestant, Question

SHAPE, MAPS = (8, 1024, 14, 14), 6  # the third stage of ER-ResNet-50 at 224 x 224, batch 8
LAYERS = 50
Call = Callable[[], list[Tensor]]


def bound(terms: int, layers: int = 1) -> float:
    """What the relative error of `layers` sums of `terms` float32 products may be: random walks of roundings."""
    return 4 * layers * torch.finfo(torch.float32).eps * math.sqrt(terms)


def agreement_within(limit: float, found: list[Tensor], expected: list[Tensor]) -> Agreement:
    """Compares tensors by ||found - expected|| / ||expected||."""
    errors = [float((a - b).double().norm() / b.double().norm()) for a, b in zip(found, expected, strict=True)]
    return Agreement(max(errors) <= limit, f"relative difference {max(errors):.1g}")


def question_of(
    name: str, title: str, calls: dict[str, Callable[[], Call]], limit: float, items: int, reference: Callable[[], Call]
) -> Question:
    """The first call is this library's own, which has to be within `limit` of the reference."""
    agreement = functools.partial(agreement_within, limit)

    def verify(result: Any) -> None:
        found = agreement(list(result), reference()())
        assert found.same, f"{found.detail} from the reference, at most {limit:.1g} expected"

    own, *others = (Contestant(who, prepare) for who, prepare in calls.items())
    return Question(name, title, own, others, verify, agreement, items)


def shortcut_sum(device: torch.device, compiled: bool) -> Question:
    """`er_shortcut_sum`, forward and backward."""
    generator = torch.Generator().manual_seed(0)

    def random() -> Tensor:
        x = torch.randn(SHAPE, generator=generator).to(device)
        return x.contiguous(memory_format=torch.channels_last)

    xs = [random().requires_grad_() for _ in range(MAPS)]
    weight = torch.ones(MAPS - 1, SHAPE[1], device=device, requires_grad=True)
    dy = random()
    limit = bound(MAPS * SHAPE[0] * SHAPE[2] * SHAPE[3])

    def call_of(function: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            for leaf in (*xs, weight):
                leaf.grad = None
            y = function(xs, weight, relu=True)
            y.backward(dy)
            return [y.detach(), xs[0].grad, weight.grad]  # type: ignore[list-item]  # backward made them

        return call

    calls = {
        OWN: lambda: call_of(er_shortcut_sum),
        "PyTorch": lambda: call_of(reference.er_shortcut_sum),
        "torch.compile": lambda: call_of(torch.compile(reference.er_shortcut_sum, dynamic=False)),
    }
    if not compiled:
        del calls["torch.compile"]
    n, c, h, w = SHAPE
    title = f"ER shortcut sum of {MAPS} maps, batch {n}, {c} x {h} x {w}, forward and backward"
    return question_of("er-shortcut", title, calls, limit, n, calls["PyTorch"])


def training_step(device: torch.device, side: int = 224, batch: int = 4) -> Question:
    """Forward and backward of ER-ResNet-50, fused against the naive composition of the same weights."""
    batch = batch if device.type == "cpu" else 16 * batch
    torch.manual_seed(0)
    network = models.er_resnet50(10).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    limit = bound(512 * 9, LAYERS)

    def call_of(fused: bool) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            network.set_fused(fused)
            network.zero_grad(set_to_none=True)
            y = network(images)
            y.square().mean().backward()
            return [y.detach()]

        return call

    title = f"ER-ResNet-50, forward and backward, {batch} images of {side} x {side}"
    calls = {OWN: lambda: call_of(True), "PyTorch": lambda: call_of(False)}
    return question_of("er-resnet50", title, calls, limit, batch, calls["PyTorch"])
