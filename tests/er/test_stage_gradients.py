"""Gradients of a stage's tails: by finite differences, over 40 maps, in threads, with NaN, and after what users do."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from er_cases import LAYOUTS, maps_like
from stage_cases import CHANNELS, NORMS, STEPS, Tails, assert_same, loss_of_all, pair, picture, tails
from torch import nn
from torch.func import functional_call

from ernet_fast.er import nodes, operators
from ernet_fast.er.stage import StageMaps


def compare(fused: Tails, naive: Tails, zs: list[torch.Tensor], **tolerances: object) -> None:
    """Values, all gradients and running statistics of both, on copies of the maps."""
    results = []
    for module in (fused, naive):
        leaves = [z.clone(memory_format=torch.preserve_format).requires_grad_() for z in zs]
        ys = module(*leaves)
        weights = torch.linspace(-1, 1, ys.numel(), dtype=ys.dtype).view_as(ys)
        (ys * weights).sum().backward()
        results.append({"y": ys.detach(), **{f"z{i}": leaf.grad for i, leaf in enumerate(leaves)}})
        results[-1] |= {name: p.grad for name, p in module.named_parameters()}
        results[-1] |= {name: b.clone() for name, b in module.named_buffers()}
    found, expected = results
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}", **tolerances)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen norm", "shortcut eval"])
@pytest.mark.parametrize(("norm", "groups"), NORMS)
def test_gradcheck(norm, groups, mode, layout):
    """By finite differences in float64. The large epsilons let N(x) depend on gamma and on the variance by much."""
    module = Tails(3, norm, groups).double().train(mode != "eval")
    if mode == "frozen norm":
        module.bns.eval()
    if mode == "shortcut eval":
        module.shortcuts.eval()
    for part in (*module.bns, *module.shortcuts):
        part.eps = 0.5
    zs = maps_like((2, CHANNELS, 2, 3), 3, torch.float64, layout, seed=4)
    names = [name for name, _ in module.named_parameters()]
    vectors = [p.detach().clone() for p in module.parameters()]
    buffers = {name: b.clone() for name, b in module.named_buffers()}

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, inputs[len(zs) :], strict=True)) | {name: b.clone() for name, b in buffers.items()}
        return functional_call(module, given, inputs[: len(zs)])

    ys = function(*zs, *vectors)
    assert float(ys[1:].detach()[ys[1:] != 0].abs().min()) > 1e-5  # no kink of a ReLU within a difference
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in (*zs, *vectors)])


def test_the_normalisation_depends_on_gamma_and_on_the_variance():
    """With the epsilons above, gradients that take N for a constant scale would be off by far more than gradcheck's."""
    module = Tails(2).double()
    for part in (*module.bns, *module.shortcuts):
        part.eps = 0.5
    (z,) = maps_like((2, CHANNELS, 2, 3), 1, torch.float64, torch.contiguous_format)
    gamma = module.bns[0].weight.detach().requires_grad_()
    v = z.var((0, 2, 3), correction=0).requires_grad_()
    scale = gamma / (v + 0.5).sqrt()
    s = 1 / (scale.square() * v + 0.5).sqrt()
    for t in (gamma, v):
        (by_s,) = torch.autograd.grad((s * scale.detach()).sum(), t, retain_graph=True)
        (whole,) = torch.autograd.grad((s * scale).sum(), t, retain_graph=True)
        assert float(by_s.norm()) > 0.1 * float(whole.norm())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["batch", "batch" + STEPS])
def test_frozen_parameters_in_evaluation_need_no_dot(monkeypatch, norm, layout):
    """Gradients towards maps alone, as of a frozen network: a sum for each map, and nothing is reduced."""
    fused, naive = tails(4, norm)
    calls: list[str] = []
    for name in ("weighted_sum", "weighted_dot", "map_dots", "channel_moments"):
        original = getattr(operators, name)
        monkeypatch.setattr(
            operators, name, lambda *args, f=original, n=name, **kw: (calls.append(n), f(*args, **kw))[1]
        )
    backward = nodes.er_block_backward
    monkeypatch.setattr(
        nodes,
        "er_block_backward",
        lambda *args, **kw: (calls.append(f"dots={args[0].needs_dots}"), backward(*args, **kw))[1],
    )
    zs = maps_like((2, CHANNELS, 3, 5), 4, torch.float64, layout)
    gradients = []
    for module in (fused, naive):
        module.eval().requires_grad_(False)
        leaves = [z.clone(memory_format=torch.preserve_format).requires_grad_() for z in zs]
        module(*leaves).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    sums = ["weighted_sum"]
    assert calls == (["dots=False"] * 4 if fused.whole else sums * 3 + ["dots=False", *sums] * 4)
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("norm", "groups"), NORMS)
def test_frozen_parameters(norm, groups, training, layout):
    """Gradients of the maps alone, in every combination."""
    fused, naive = tails(3, norm, groups)
    zs = maps_like((2, CHANNELS, 3, 5), 3, torch.float64, layout)
    for module in (fused, naive):
        module.train(training).requires_grad_(False)
    compare(fused, naive, zs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("norm", "groups"), NORMS)
def test_forty_maps(norm, groups, training):
    fused, naive = tails(40, norm, groups)
    zs = maps_like((3, CHANNELS, 3, 5), 40, torch.float64, torch.channels_last)
    compare(fused.train(training), naive.train(training), zs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_maps", [2, 3, 7, 8, 9, 16, 17, 23])
def test_other_numbers_of_maps(num_maps):
    zs = maps_like((2, CHANNELS, 3, 5), num_maps, torch.float64, torch.contiguous_format)
    compare(*tails(num_maps), zs, rtol=1e-9, atol=1e-9)


def test_accumulation_over_micro_batches():
    """Gradients of three batches add up in .grad, running statistics move three times."""
    fused, naive = pair()
    for seed in range(3):
        x, y = picture(seed), picture(seed)
        loss_of_all(fused(x)).backward()
        loss_of_all(naive(y)).backward()
        assert_same(fused, naive, x, y)


@pytest.mark.parametrize(("norm", "groups"), NORMS)
@pytest.mark.parametrize("what", ["output", "map"])
def test_changed_in_place_is_an_error(what, norm, groups):
    """Autograd knows every map and output that backward reads, so that it cannot go wrong in silence."""
    module = Tails(3, norm, groups).double()
    leaves = [z.requires_grad_() for z in maps_like((2, CHANNELS, 3, 3), 3, torch.float64, torch.contiguous_format)]
    zs = [leaf * 1 for leaf in leaves]
    maps = StageMaps(fused=True)
    maps.start(zs[0], module.shortcuts, module.bns)
    ys = [maps.add(z, bn, s) for z, bn, s in zip(zs[1:], module.bns, module.shortcuts, strict=True)]
    total = ys[0].sum() + ys[1].square().sum()
    with torch.no_grad():
        (ys[0] if what == "output" else zs[1]).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_running_statistics_changed_before_backward_are_an_error():
    """Evaluation reads them in backward too."""
    module = Tails(3).double().eval()
    zs = [z.requires_grad_() for z in maps_like((2, CHANNELS, 3, 3), 3, torch.float64, torch.contiguous_format)]
    y = module(*zs)
    module.shortcuts[1].running_var.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_threads():
    """Each thread trains a stage of its own; nothing is shared between backward passes."""
    expected = []
    for seed in range(3):
        fused, _ = pair()
        loss_of_all(fused(picture(seed))).backward()
        expected.append([p.grad for p in fused.parameters()])
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(5):
            fused = copy.deepcopy(stage)
            loss_of_all(fused(picture(seed))).backward()
            if not all(torch.equal(p.grad, g) for p, g in zip(fused.parameters(), expected[seed], strict=True)):
                wrong.append(seed)

    stage, _ = pair()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("norm", "groups"), NORMS)
def test_nan_and_infinity_go_where_they_go_in_the_naive_composition(norm, groups, value, training):
    """One bad value of one map: in values, gradients and running statistics, and in no channel but those.

    With one exception: N(x) does not depend on beta, which the naive composition finds out by subtracting NaN.
    """
    fused, naive = tails(4, norm, groups)
    zs = maps_like((2, CHANNELS, 3, 5), 4, torch.float64, torch.contiguous_format)
    zs[1][1, 2, 0, 3] = float(value)
    found, expected = [], []
    for module, results in ((fused, found), (naive, expected)):
        module.train(training)
        leaves = [z.clone().requires_grad_() for z in zs]
        ys = module(*leaves)
        ys.sum().backward()
        results += [ys.detach(), *(leaf.grad for leaf in leaves)]
        results += [b.clone() for b in module.buffers()]
        results += [p.grad for name, p in module.named_parameters() if name != "bns.0.bias"]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.isfinite(), b.isfinite())
        torch.testing.assert_close(a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0), rtol=1e-9, atol=1e-9)
    assert bool(found[0].isfinite().any()) and not bool(found[0].isfinite().all())
    ours, theirs = fused.bns[0].bias.grad, naive.bns[0].bias.grad
    if norm.startswith("batch") and training:
        assert float(ours[2]) == zs[0].numel() / CHANNELS and bool(theirs[2].isnan())
    else:
        torch.testing.assert_close(ours.isfinite(), theirs.isfinite())


def test_parameters_need_not_be_contiguous():
    """Maps are contiguous: of channels-last ones PyTorch's own batch norm gets the gradient wrong then, on the CPU."""
    fused, naive = tails(3)
    for module in (fused, naive):
        for part in module.shortcuts:
            part.weight = nn.Parameter(part.weight.detach().t().contiguous().t())
        for bn in module.bns:
            bn.weight = nn.Parameter(torch.stack([bn.weight.detach()] * 2, 1)[:, 0])
            bn.bias = nn.Parameter(bn.bias.detach()[:1].expand(CHANNELS))
    assert not any(p.is_contiguous() for p in (fused.shortcuts[1].weight, fused.bns[0].weight, fused.bns[0].bias))
    compare(
        fused, naive, maps_like((2, CHANNELS, 3, 5), 3, torch.float64, torch.contiguous_format), rtol=1e-9, atol=1e-10
    )
