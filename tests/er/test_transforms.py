"""Forward-mode AD, torch.func, batched gradients and second derivatives: right, or an error that names fused=False."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from path_cases import CHANNELS, NORMS, assert_same, by_norm, maps, network, stage, step
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

from ernet_fast import ERShortcut, er_shortcut_sum, fold_for_inference
from ernet_fast.reference import er_shortcut_sum as reference_shortcut_sum

WAY_OUT = "fused=False"
CLOSE = {"rtol": 1e-8, "atol": 1e-9}
NEAR = {"batch": 3, "size": (5, 4)}


def twins(norm: str, *, training: bool = False) -> tuple[nn.Module, nn.Module]:
    fused, naive = stage(norm, 3, stride=1), stage(norm, 3, stride=1, fused=False)
    return fused.train(training), naive.train(training)


def difference(f: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    """A central difference: truncation and rounding both leave 1e-10 of values of this size."""
    h = 1e-5
    with torch.no_grad():
        return (f(x + h * t) - f(x - h * t)) / (2 * h)


def dual_tangent(f: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent


MODES = ["grad", "no_grad", "frozen"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["stage", "network", "folded", "shortcut"])
def test_dual_numbers(kind: str, mode: str, norm: str) -> None:
    x = maps(3, 2, 3, (33, 32)) if kind in ("network", "folded") else maps(3, **NEAR)
    if kind == "stage":
        made: nn.Module = twins(norm)[0]
    elif kind == "shortcut":
        made = ERShortcut(CHANNELS, 1, **by_norm(norm)).double()
    else:
        made = network(norm)
    made.eval()
    if kind == "folded":
        made = fold_for_inference(made)
    made.requires_grad_(mode != "frozen")
    f = (lambda v: made([v, v * v])) if kind == "shortcut" else made
    t = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(mode != "no_grad"):
        found = dual_tangent(f, x, t)
    assert found is not None
    torch.testing.assert_close(found, difference(f, x, t), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", MODES)
def test_dual_numbers_of_the_sum(mode: str, norm: str) -> None:
    xs = [maps(seed, **NEAR) for seed in range(3)]
    weight = torch.randn(2, CHANNELS, dtype=torch.float64).requires_grad_(mode == "grad")
    options = by_norm(norm)
    t = maps(9, **NEAR)
    f = lambda v: er_shortcut_sum([v, *xs[1:]], weight, relu=True, **options)  # noqa: E731
    with torch.set_grad_enabled(mode != "no_grad"):
        found = dual_tangent(f, xs[0], t)
        of_weight = dual_tangent(
            lambda w: er_shortcut_sum(xs, w, relu=True, **options), weight.detach(), torch.ones_like(weight)
        )
    assert found is not None and of_weight is not None
    torch.testing.assert_close(found, difference(f, xs[0], t), rtol=1e-6, atol=1e-8)
    g = lambda w: er_shortcut_sum(xs, w, relu=True, **options)  # noqa: E731
    torch.testing.assert_close(of_weight, difference(g, weight.detach(), torch.ones_like(weight)), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("norm", NORMS)
def test_dual_parameters(norm: str) -> None:
    """A tangent that only the weights of a shortcut carry reaches the output, though no map carries one at first."""
    fused, _ = twins(norm)
    x, weight = maps(3, **NEAR), fused[1].shortcut.weight.detach().clone()

    def f(w: Tensor) -> Tensor:
        return functional_call(fused, {"1.shortcut.weight": w}, (x,))

    found = dual_tangent(f, weight, torch.ones_like(weight))
    assert found is not None
    torch.testing.assert_close(found, difference(f, weight, torch.ones_like(weight)), rtol=1e-6, atol=1e-7)


def func_cases(model: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    """Each transform of torch.func, of the stage's input or parameters."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    state = model.state_dict()
    t = maps(9, **NEAR)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, (parameters, buffers), (x,)).square().sum()

    def of_state(x: Tensor) -> Tensor:
        return functional_call(model, state, (x,))

    stacked = [{name: torch.stack([v, v * 2]) for name, v in part.items()} for part in (parameters, buffers)]
    return {
        "grad": lambda: grad(loss)(parameters, x),
        "vmap of grad": lambda: vmap(grad(lambda p, v: loss(p, v[None])), (None, 0))(parameters, x),
        "vjp": lambda: vjp(model, x)[1](t)[0],
        "jvp": lambda: jvp(model, (x,), (t,))[1],
        "jacrev": lambda: jacrev(lambda v: model(v).sum((0, 2, 3)))(x),
        "jacfwd": lambda: jacfwd(lambda a: model(x * a).sum((0, 2, 3)))(torch.ones(CHANNELS, 1, 1, dtype=x.dtype)),
        "ensemble": lambda: vmap(lambda p, b: functional_call(model, (p, b), (x,)))(*stacked),
        "hessian": lambda: jacfwd(jacrev(lambda a: model(x * a).square().sum()))(
            torch.ones(CHANNELS, 1, 1, dtype=x.dtype)
        ),
        "keys of the state dict": lambda: of_state(x),
    }


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", func_cases(stage(), maps(**NEAR)))
def test_func(case: str, norm: str) -> None:
    fused, naive = twins(norm)
    found = func_cases(fused, maps(3, **NEAR))[case]()
    expected = func_cases(naive, maps(3, **NEAR))[case]()
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", ["grad", "vmap of grad", "ensemble"])
def test_compiled_func(case: str, norm: str) -> None:
    torch._dynamo.reset()
    fused, naive = twins(norm)
    found = torch.compile(func_cases(fused, maps(3, **NEAR))[case], backend="eager")()
    torch.testing.assert_close(found, func_cases(naive, maps(3, **NEAR))[case](), **CLOSE)


@pytest.mark.parametrize("norm", NORMS)
def test_training_with_copies_of_the_buffers(norm: str) -> None:
    """Running statistics that a transform copies are updated within it."""

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            buffers = {name: b.clone() for name, b in model.named_buffers()}
            return functional_call(model, (parameters, buffers), (maps(3, **NEAR),)).square().sum()

        return grad(loss)({name: p.detach() for name, p in model.named_parameters()})

    fused, naive = twins(norm, training=True)
    torch.testing.assert_close(gradients(fused), gradients(naive), **CLOSE)
    named = dict(fused.named_parameters())
    expected = torch.autograd.grad(fused(maps(3, **NEAR)).square().sum(), list(named.values()))
    torch.testing.assert_close(gradients(naive), dict(zip(named, expected, strict=True)), **CLOSE)


@pytest.mark.parametrize("norm", NORMS)
def test_func_of_the_sum(norm: str) -> None:
    xs = [maps(seed, **NEAR) for seed in range(3)]
    weight, t = torch.randn(2, CHANNELS, dtype=torch.float64), torch.ones(2, CHANNELS, dtype=torch.float64)
    options = {"relu": True, **by_norm(norm)}

    def results(function: Callable[..., Tensor]) -> list[Any]:
        f = lambda w: function(xs, w, **options)  # noqa: E731
        return [
            grad(lambda w: f(w).square().sum())(weight),
            jvp(f, (weight,), (t,))[1],
            jacrev(lambda w: f(w).sum((0, 2, 3)))(weight),
            jacfwd(lambda w: f(w).sum((0, 2, 3)))(weight),
            vmap(f)(torch.stack([weight, t])),
            jacfwd(jacrev(lambda w: f(w).square().sum()))(weight),
        ]

    torch.testing.assert_close(results(er_shortcut_sum), results(reference_shortcut_sum), **CLOSE)


@pytest.mark.parametrize("norm", NORMS)
def test_parameters_swapped_for_a_call(norm: str) -> None:
    """functional_call without a transform runs fused, with gradients towards the tensors that were given."""
    fused, naive = twins(norm, training=True)
    given = {name: (v * 1.5).requires_grad_() for name, v in fused.state_dict().items() if v.is_floating_point()}
    twin = {name: v.detach().clone().requires_grad_() for name, v in given.items()}
    for tensors in (given, twin):
        for name in tensors:
            if "running" in name:
                tensors[name].requires_grad_(False)
    outs = [functional_call(model, tensors, (maps(**NEAR),)) for model, tensors in ((fused, given), (naive, twin))]
    torch.testing.assert_close(*outs, **CLOSE)
    wanted = [[v for v in tensors.values() if v.requires_grad] for tensors in (given, twin)]
    found, expected = (torch.autograd.grad(y.square().sum(), v) for y, v in zip(outs, wanted, strict=True))
    assert_same({f"{i}.grad": v for i, v in enumerate(found)}, {f"{i}.grad": v for i, v in enumerate(expected)})
    for name in given:  # the running statistics that were given, and only these, have been updated
        torch.testing.assert_close(given[name], twin[name], **CLOSE)
    torch.testing.assert_close(dict(fused.named_buffers()), dict(naive.named_buffers()), rtol=0, atol=0)


def batched_and_second(f: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Callable[[], Any]]:
    x = x.clone().requires_grad_()
    vectors = torch.stack([torch.ones_like(x), maps(8, **NEAR)])

    def double_backward() -> Any:
        (dx,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    def vmap_over_one_graph() -> Any:
        y = f(x)
        return vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(vectors)

    return {
        "create_graph": double_backward,
        "is_grads_batched": lambda: torch.autograd.grad(f(x), x, vectors, is_grads_batched=True)[0],
        "jacobian, vectorized": lambda: torch.autograd.functional.jacobian(
            lambda v: f(v).sum((0, 2, 3)), x.detach(), vectorize=True
        ),
        "jacobian": lambda: torch.autograd.functional.jacobian(lambda v: f(v).sum((0, 2, 3)), x.detach()),
        "jacobian, forward mode": lambda: torch.autograd.functional.jacobian(
            lambda v: f(x * v).sum((0, 2, 3)), torch.ones(1, CHANNELS, 1, 1, dtype=x.dtype), vectorize=True,
            strategy="forward-mode",
        ),
        "hessian": lambda: torch.autograd.functional.hessian(
            lambda v: f(x.detach() * v).square().sum(), torch.ones(1, CHANNELS, 1, 1, dtype=x.dtype)
        ),
        "vmap of grad over one graph": vmap_over_one_graph,
    }  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", batched_and_second(torch.relu, maps(**NEAR)))
def test_batched_gradients_and_second_derivatives(case: str, norm: str, training: bool) -> None:
    fused, naive = twins(norm, training=training)
    right_or_refused(batched_and_second(fused, maps(3, **NEAR))[case], batched_and_second(naive, maps(3, **NEAR))[case])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", batched_and_second(torch.relu, maps(**NEAR)))
def test_batched_gradients_and_second_derivatives_of_the_sum(case: str, norm: str) -> None:
    xs = [maps(seed, **NEAR) for seed in (1, 2)]
    weight = torch.randn(2, CHANNELS, dtype=torch.float64, requires_grad=True)
    found, expected = (
        batched_and_second(lambda v, f=f: f([v, *xs], weight, relu=True, **by_norm(norm)), maps(3, **NEAR))[case]
        for f in (er_shortcut_sum, reference_shortcut_sum)
    )
    right_or_refused(found, expected)


def right_or_refused(found: Callable[[], Any], expected: Callable[[], Any]) -> None:
    try:
        values = found()
    except RuntimeError as error:
        assert WAY_OUT in str(error)
        return
    torch.testing.assert_close(values, expected(), **CLOSE)


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_after_a_transform(norm: str) -> None:
    """Nothing of a transform is left behind, also of one that failed."""
    fused, naive = twins(norm, training=True)
    x = maps(3, **NEAR)
    with pytest.raises(ZeroDivisionError), forward_ad.dual_level():
        fused(forward_ad.make_dual(x, x))
        _ = 1 / 0
    with pytest.raises(ZeroDivisionError):
        vmap(lambda v: 1 / 0)(x)
    fused.load_state_dict(naive.state_dict())
    assert_same(step(fused, x), step(naive, x))
