"""Captured networks and training steps: replays are what calls would be. A recorder stands in for CUDA's graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from recorded_graph import Capture, RecordedGraph, recorded_graphs
from torch import Tensor, nn

import ernet_fast
from ernet_fast.er import epilogue
from ernet_fast.models import ERResNet
from ernet_fast.train import GraphedStep

LOSS = nn.CrossEntropyLoss()


def network() -> ERResNet:
    torch.manual_seed(0)
    return ERResNet("bottleneck", (2, 3, 1, 1), 3, base_channels=4).double()


def batch(seed: int, n: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn((n, 3, 33, 33), generator=generator, dtype=torch.float64),
        torch.randint(0, 3, (n,), generator=generator),
    )


def eager(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    output = model(images)
    loss = LOSS(output, labels)
    loss.backward()
    return loss.detach(), output.detach()


def test_the_recorder():
    """A capture runs nothing, a replay everything, and what waits is refused."""
    x, total, graph = torch.ones(3), torch.zeros(3), RecordedGraph()
    with Capture(graph):
        y = (2 * x).add_(1)
        total += y
    assert bool(y.isnan().all()) and not bool(total.any())
    x.fill_(3)
    graph.replay()
    assert torch.equal(y, torch.full((3,), 7.0)) and torch.equal(total, y)
    with pytest.raises(AssertionError, match="waits for the device"), Capture(graph):
        float(x[0])


@pytest.mark.parametrize("by_steps", [False, True])
def test_training(by_steps, monkeypatch):
    """Losses, outputs, gradients and statistics of several steps with an optimiser, from where the network was."""
    if by_steps:  # as on GPUs
        monkeypatch.setattr(epilogue, "block_operator_supports", lambda x, group: False)
    plain = network()
    graphed = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (plain, graphed)]
    with recorded_graphs():
        step = GraphedStep(graphed, LOSS, *batch(0))
        for name, value in graphed.state_dict().items():
            assert torch.equal(value, plain.state_dict()[name]), f"the capture changed {name}"
        for seed in (1, 2, 3):
            expected, found = eager(plain, *batch(seed)), step(*batch(seed))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)
            for (name, p), q in zip(graphed.named_parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, msg=lambda m, n=name: f"{n}: {m}")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    for name, value in graphed.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name])
    assert int(graphed.bn1.num_batches_tracked) == 3


def test_results_are_new_tensors():
    with recorded_graphs():
        step = GraphedStep(network(), LOSS, *batch(0))
        first = step(*batch(1))
        kept = [t.clone() for t in first]
        step(*batch(2))
    assert all(torch.equal(*pair) for pair in zip(first, kept, strict=True))


def test_what_a_captured_step_refuses():
    with pytest.raises(RuntimeError, match="GraphedStep needs network and batch on a CUDA device; it is on cpu"):
        GraphedStep(network(), LOSS, *batch(0))
    with pytest.raises(ValueError, match=r"evaluation mode, .* call model.train\(\)"):
        GraphedStep(network().eval(), LOSS, *batch(0))
    with recorded_graphs():
        model = network()
        step = GraphedStep(model, LOSS, *batch(0))
        images, labels = batch(1)
        with pytest.raises(ValueError, match=r"images must be torch.float64 \[4, 3, 33, 33\].*; got .* \[3,"):
            step(images[:3], labels[:3])
        with pytest.raises(ValueError, match=r"labels must be torch.int64 \[4\].*; got torch.float64"):
            step(images, labels.double())
        model.eval()
        with pytest.raises(ValueError, match="the model is in evaluation mode"):
            step(images, labels)
        model.train().to(memory_format=torch.channels_last)
        with pytest.raises(RuntimeError, match="parameters have moved since the capture"):
            step(images, labels)


def test_inference():
    """A graph for each shape; what a copy of the network captures is its own."""
    model = network().eval()
    with recorded_graphs(), torch.no_grad():
        graphed = ernet_fast.optimize_for_inference(model, cuda_graph=True)
        for seed, n in ((1, 2), (2, 1), (3, 2)):
            x, _ = batch(seed, n)
            torch.testing.assert_close(graphed(x), model(x))
            torch.testing.assert_close(graphed(x + 1), model(x + 1))
        assert len(graphed._graphs) == 2
        twin = copy.deepcopy(graphed)
        assert not twin._graphs
        torch.testing.assert_close(twin(x), model(x))
