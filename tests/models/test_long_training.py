"""Two hundred steps: fused training goes no other way than naive training does when its sums are in another order."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ernet_fast.models import ERResNet
from ernet_fast.reference.er_network import NaiveERResNet, state_dict_from_fused

STEPS = 200
LAYERS = (1, 3, 1, 1)


def parameters_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for _, parameter in sorted(model.named_parameters())])


def train(model: nn.Module, order: int | None = None) -> tuple[Tensor, Tensor]:
    """Losses of all steps, and the parameters after them; `order` seeds permutations of each batch, which change the
    order of every sum over samples and, but for rounding, nothing.
    """
    data = torch.Generator().manual_seed(1)
    shuffle = torch.Generator().manual_seed(order or 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005)
    losses = []
    for _ in range(STEPS):
        labels = torch.randint(0, 3, (8,), generator=data)
        x = torch.randn(8, 3, 20, 20, generator=data) + labels.view(-1, 1, 1, 1)
        if order is not None:
            chosen = torch.randperm(8, generator=shuffle)
            x, labels = x[chosen], labels[chosen]
        loss = cross_entropy(model(x), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses), parameters_of(model)


def test_two_hundred_steps() -> None:
    """Both distances - of the losses, and of the parameters at the end - are at most twice those of naive runs.

    Without momentum, at a small rate, rounding errors are not amplified: runs stay about 1e-6 apart, where an eps of
    2e-5 for 1e-5 in the shortcuts leads several times as far.
    """
    torch.manual_seed(1)
    fused = ERResNet("basic", LAYERS, 3, base_channels=4)
    naive = [NaiveERResNet(LAYERS, "basic", 3, base_channels=4) for _ in range(3)]
    for model in naive:
        model.load_state_dict(state_dict_from_fused(fused.state_dict()))
    expected, *others = [train(model, order) for model, order in zip(naive, (None, 1, 2), strict=True)]
    found = train(fused)

    def distances(run: tuple[Tensor, Tensor]) -> list[float]:
        return [float((a - b).norm() / b.norm()) for a, b in zip(run, expected, strict=True)]

    noise = [max(pair) for pair in zip(*map(distances, others), strict=True)]
    assert expected[0][-20:].mean() < 0.8 * expected[0][:20].mean(), "it learns"
    assert 0 < max(noise) < 1e-4
    for distance, allowed in zip(distances(found), noise, strict=True):
        assert distance <= 2 * allowed
