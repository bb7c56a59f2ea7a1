"""Several backward passes over one graph: at once in threads, one inside another, over parts, after one that failed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from path_cases import CHANNELS, NORMS, by_norm, maps, stage
from torch import Tensor

from ernet_fast import ERStage, er_shortcut_sum

Gradients = tuple[Tensor | None, ...]


@pytest.fixture(autouse=True)
def one_thread_an_operator() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def graph(norm: str, seed: int = 0) -> tuple[Tensor, list[Tensor], list[Tensor], ERStage]:
    """A stage's output, the outputs of its blocks, and all that has gradients: input and parameters."""
    made, ys = stage(norm, 4), []
    for block in made:
        block.register_forward_hook(lambda module, inputs, output: ys.append(output))
    x = maps(seed, size=(11, 10)).requires_grad_()
    return made(x), ys, [x, *made.parameters()], made


def graph_of_sum(norm: str) -> tuple[Tensor, list[Tensor], list[Tensor], None]:
    xs = [maps(seed, size=(11, 10)).requires_grad_() for seed in range(4)]
    weight = torch.randn(3, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = er_shortcut_sum([x * 1 for x in xs], weight, relu=True, **by_norm(norm))
    return y, [y], [*xs, weight], None


GRAPHS = {"stage": graph, "sum": graph_of_sum}


def gradients(y: Tensor, scale: float, wanted: Sequence[Tensor]) -> Gradients:
    seed = torch.linspace(-1, scale, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad(y, wanted, seed, retain_graph=True, allow_unused=True)


def assert_equal(found: Gradients, expected: Gradients) -> None:
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None
        else:
            assert one is not None and torch.equal(one, other)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", GRAPHS)
def test_threads_over_one_graph(kind: str, norm: str) -> None:
    """Every thread has a gradient of its own to send back, and gets what it gets alone, bit by bit."""
    y, _, wanted, _ = GRAPHS[kind](norm)
    scales = [1.0, 2.0, 3.0]
    expected = [gradients(y, scale, wanted) for scale in scales]
    start, rounds = threading.Barrier(len(scales)), 12
    found: list[list[Gradients]] = [[] for _ in scales]

    def work(k: int) -> None:
        for _ in range(rounds):
            start.wait(60)
            found[k].append(gradients(y, scales[k], wanted))

    run_threads([lambda k=k: work(k) for k in range(len(scales))])
    for k in range(len(scales)):
        assert len(found[k]) == rounds
        for one in found[k]:
            assert_equal(one, expected[k])


@pytest.mark.parametrize("norm", NORMS)
def test_threads_over_parts_of_one_graph(norm: str) -> None:
    """Each thread starts at another block and asks for other gradients."""
    _, ys, wanted, _ = graph(norm)
    parts = [(ys[3], wanted), (ys[2], wanted[:1]), (ys[1], wanted[4:]), (ys[3], wanted[-3:])]
    expected = [gradients(y, 2.0, part) for y, part in parts]
    start, rounds = threading.Barrier(len(parts)), 8
    found: list[list[Gradients]] = [[] for _ in parts]

    def work(k: int) -> None:
        for _ in range(rounds):
            start.wait(60)
            found[k].append(gradients(parts[k][0], 2.0, parts[k][1]))

    run_threads([lambda k=k: work(k) for k in range(len(parts))])
    for k in range(len(parts)):
        assert len(found[k]) == rounds
        for one in found[k]:
            assert_equal(one, expected[k])


def run_threads(works: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("at", [1, 2])
def test_one_pass_inside_another(at: int, norm: str) -> None:
    y, ys, wanted, _ = graph(norm)
    expected, inner_expected = gradients(y, 1.0, wanted), gradients(y, 3.0, wanted)
    inner: list[Gradients] = []

    def hook(_: Tensor) -> None:
        if not inner:
            inner.append(())  # the inner pass comes by here too
            inner.append(gradients(y, 3.0, wanted))

    ys[at].register_hook(hook)
    assert_equal(gradients(y, 1.0, wanted), expected)
    assert_equal(inner[1], inner_expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_pass_over_a_part(at: int, norm: str) -> None:
    """Before and after a pass over all: gradients are those of a graph that ends there."""
    y, ys, wanted, made = graph(norm)
    expected = gradients(y, 1.0, wanted)
    part = gradients(ys[at], 2.0, wanted)
    assert_equal(gradients(y, 1.0, wanted), expected)
    assert_equal(gradients(ys[at], 2.0, wanted), part)
    naive = stage(norm, 4, fused=False)
    naive_ys: list[Tensor] = []
    for block in naive:
        block.register_forward_hook(lambda module, inputs, output: naive_ys.append(output))
    x = wanted[0].detach().clone().requires_grad_()
    naive(x)
    reference = gradients(naive_ys[at], 2.0, [x, *naive.parameters()])
    for (name, _), one, other in zip([("x", x), *made.named_parameters()], part, reference, strict=True):
        if other is None:
            assert one is None or not one.any(), name
        else:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_pass_that_an_error_ends(at: int, norm: str) -> None:
    y, ys, wanted, _ = graph(norm)
    expected = gradients(y, 1.0, wanted)

    def fail(_: Tensor) -> None:
        raise ZeroDivisionError("on purpose")

    handle = ys[at].register_hook(fail)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="on purpose"):
            gradients(y, 1.0, wanted)
    handle.remove()
    assert_equal(gradients(y, 1.0, wanted), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_pass_over_a_freed_graph_is_pytorchs_error(norm: str) -> None:
    y, _, wanted, _ = graph(norm)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), wanted)
