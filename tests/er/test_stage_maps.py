"""A stage's fused forward and backward against the naive composition, in every way autograd can be used."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from stage_cases import CHANNELS, NORMS, Stage, assert_same, loss_of_all, loss_of_last, loss_of_middle, pair, picture
from torch import nn
from torch.utils.checkpoint import checkpoint

from ernet_fast import ERShortcut
from ernet_fast.er import operators
from ernet_fast.er.stage import StageMaps


@pytest.mark.parametrize("loss", [loss_of_last, loss_of_middle, loss_of_all])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen norm", "shortcut eval", "one shortcut eval"])
@pytest.mark.parametrize(("norm", "groups"), NORMS)
def test_values_and_gradients(norm, groups, mode, loss):
    fused, naive = pair(norm=norm, num_groups=groups)
    for stage in (fused, naive):
        for seed in range(2):  # running statistics worth using
            stage(picture(seed + 10).detach())
        stage.train(mode != "eval")
        for module in stage.modules():
            if mode == "frozen norm" and isinstance(module, nn.BatchNorm2d):
                module.eval()
            if mode == "shortcut eval" and isinstance(module, ERShortcut):
                module.eval()
        if mode == "one shortcut eval":
            stage.shortcuts[1].eval()
    x, y = picture(), picture()
    ours, expected = fused(x), naive(y)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    loss(ours).backward()
    loss(expected).backward()
    assert_same(fused, naive, x, y)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout_is_kept(layout):
    fused, naive = pair()
    fused, naive = fused.to(memory_format=layout), naive.to(memory_format=layout)
    x, y = picture(layout=layout), picture(layout=layout)
    ours = fused(x)
    assert all(t.is_contiguous(memory_format=layout) for t in ours)
    loss_of_all(ours).backward()
    loss_of_all(naive(y)).backward()
    assert_same(fused, naive, x, y)


@pytest.mark.parametrize(
    "bn",
    [
        nn.Identity,
        lambda c: nn.GroupNorm(2, c),
        lambda c: nn.BatchNorm2d(c, affine=False),
        lambda c: nn.BatchNorm2d(c, track_running_stats=False),
        lambda c: nn.BatchNorm2d(c, momentum=None),
    ],
)
def test_other_normalisations_of_the_branch(bn):
    fused, naive = pair(bn=bn)
    for stage in (fused, naive):
        stage(picture(4).detach())
    for training in (True, False):
        fused.train(training), naive.train(training)
        fused.zero_grad(), naive.zero_grad()
        x, y = picture(), picture()
        loss_of_all(fused(x)).backward()
        loss_of_all(naive(y)).backward()
        assert_same(fused, naive, x, y)


def test_retained_graph_twice_and_parts_of_it():
    fused, naive = pair()
    x, y = picture(), picture()
    ours, expected = fused(x), naive(y)
    for loss in (loss_of_all, loss_of_middle, loss_of_last, loss_of_all):
        loss(ours).backward(retain_graph=True)
        loss(expected).backward(retain_graph=True)
        assert_same(fused, naive, x, y)


def test_gradient_of_selected_inputs():
    """autograd.grad towards one weight runs only a part of the graph; the next full pass must not see leftovers."""
    fused, naive = pair()
    x, y = picture(), picture()
    ours, expected = fused(x), naive(y)
    for target in ("shortcuts.2.weight", "convs.1.weight", "bns.0.weight"):
        (a,) = torch.autograd.grad(loss_of_all(ours), [fused.get_parameter(target)], retain_graph=True)
        (b,) = torch.autograd.grad(loss_of_all(expected), [naive.get_parameter(target)], retain_graph=True)
        torch.testing.assert_close(a, b)
    loss_of_all(ours).backward()
    loss_of_all(expected).backward()
    assert_same(fused, naive, x, y)


@pytest.mark.parametrize("frozen", ["convs", "bns", "shortcuts", "convs.0", "all but shortcuts", "input"])
def test_frozen_parameters(frozen):
    fused, naive = pair()
    for stage in (fused, naive):
        for name, parameter in stage.named_parameters():
            wanted = name.startswith(frozen) if frozen != "all but shortcuts" else not name.startswith("shortcuts")
            parameter.requires_grad_(not wanted)
    x, y = picture(), picture()
    if frozen in ("input", "all but shortcuts"):
        x, y = x.detach(), y.detach()
    loss_of_all(fused(x)).backward()
    loss_of_all(naive(y)).backward()
    assert_same(fused, naive, x, y)


@pytest.mark.parametrize(("norm", "groups"), NORMS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, norm, groups):
    fused, naive = pair(norm=norm, num_groups=groups)
    x, y = picture(), picture()
    loss_of_all(checkpoint(lambda t: tuple(fused(t)), x, use_reentrant=reentrant)).backward()
    loss_of_all(checkpoint(lambda t: tuple(naive(t)), y, use_reentrant=reentrant)).backward()
    assert_same(fused, naive, x, y)


@pytest.mark.parametrize(("norm", "groups"), NORMS)
def test_checkpoint_frees_the_maps(norm, groups):
    """What a checkpointed stage keeps must not include its maps."""
    fused, _ = pair(norm=norm, num_groups=groups)
    kept: list[int] = []

    def count(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        checkpoint(lambda t: fused(t)[-1], picture(), use_reentrant=False)
    assert sum(n > CHANNELS * CHANNELS * 9 for n in kept) <= 1  # the stage's input at most


def test_gradient_accumulation_and_two_passes_at_once():
    fused, naive = pair()
    x, y = picture(1), picture(1)
    ours = [fused(x), fused(x)]
    expected = [naive(y), naive(y)]
    (loss_of_all(ours[1]) + loss_of_last(ours[0])).backward()
    (loss_of_all(expected[1]) + loss_of_last(expected[0])).backward()
    assert_same(fused, naive, x, y)


def test_no_grad_equals_grad():
    fused, _ = pair()
    fused.eval()
    with_graph = fused(picture())
    with torch.no_grad():
        plain = fused(picture())
    with torch.inference_mode():
        inference = fused(picture().detach())
    for a, b, c in zip(with_graph, plain, inference, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
        assert not b.requires_grad


@pytest.mark.parametrize(("norm", "groups"), NORMS)
def test_each_gradient_is_written_once(monkeypatch, norm, groups):
    """Backward of a stage of L maps: L weighted sums and L map_dots, or one operator a map; nothing is added up."""
    fused, _ = pair(blocks=5, norm=norm, num_groups=groups)
    ys = fused(picture())
    calls: Counter[str] = Counter()
    written: list[int] = []
    for name in ("weighted_sum", "weighted_dot", "map_dots", "channel_moments"):
        original = getattr(operators, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            calls[_name] += 1
            result = _original(*args, **kwargs)
            if _name == "weighted_sum":
                written.append(result.numel())
            return result

        monkeypatch.setattr(operators, name, counted)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        loss_of_last(ys).backward()
    whole = [e for e in profile.events() if e.name == "ernet::er_block_backward"]
    if fused.whole:
        assert len(whole) == 6 and not calls
    else:
        assert not whole and calls == {"weighted_sum": 6, "map_dots": 6}
        assert written == [ys[0].numel()] * 6
    size = list(ys[0].shape)
    additions = [
        e
        for e in profile.events()
        if e.name in ("aten::add", "aten::add_") and e.input_shapes and e.input_shapes[0] == size
    ]
    assert not additions, [e.input_shapes for e in additions]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("norm", "groups"), NORMS)
def test_second_derivative_is_a_clear_error(norm, groups, training):
    fused, _ = pair(norm=norm, num_groups=groups)
    fused.train(training)
    x = picture()
    with pytest.raises(RuntimeError, match=r"no second derivative.*fused=False"):
        torch.autograd.grad(loss_of_all(fused(x)), x, create_graph=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("norm", "groups"), NORMS)
def test_empty_batch(norm, groups, training):
    fused, _ = pair(norm=norm, num_groups=groups)
    fused.train(training)
    x = torch.empty(0, CHANNELS, 4, 4, dtype=torch.float64, requires_grad=True)
    before = copy.deepcopy(fused.state_dict())
    out = fused(x)[-1]
    out.sum().backward()
    assert out.shape == x.shape
    for name, value in fused.state_dict().items():
        if "tracked" not in name:
            torch.testing.assert_close(value, before[name])
    assert x.grad.shape == x.shape and not any(bool(p.grad.any()) for p in fused.parameters() if p.grad is not None)


def test_single_values():
    for stage in pair():
        with pytest.raises(ValueError, match="[vV]alue"):
            stage(torch.ones(1, CHANNELS, 1, 1, dtype=torch.float64))


def test_wrong_number_of_maps_is_named():
    maps = StageMaps(fused=True)
    x = torch.randn(2, CHANNELS, 3, 3)
    maps.start(x, [ERShortcut(CHANNELS, 1)])
    with pytest.raises(ValueError, match="weights for 3 earlier maps of 6 channels; got 1 maps"):
        maps.add(x, nn.BatchNorm2d(CHANNELS), ERShortcut(CHANNELS, 3))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bn", [nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c)])
@pytest.mark.parametrize(("norm", "groups"), NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_a_float32_map(dtype, norm, groups, bn, fused):
    """x_0 stays float32, convolutions give halves: they join it, as a residual sum of PyTorch would promote them."""
    torch.manual_seed(0)
    stage = Stage(norm=norm, num_groups=groups, bn=bn)
    stage.fused = fused
    x = picture().detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = stage(x)[-1]
    exact = copy.deepcopy(stage).double()
    truth = exact(x.detach().double())[-1]
    y.square().mean().backward()
    truth.square().mean().backward()
    assert y.dtype == x.grad.dtype == torch.float32
    # four blocks: each rounds twice, its input and its convolution, and a normaliser may enlarge that
    assert float((y.detach() - truth.detach()).norm() / truth.detach().norm()) < 16 * torch.finfo(dtype).eps
    for p, q in zip(stage.parameters(), exact.parameters(), strict=True):  # a ReLU may change sides: directions agree
        assert p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all())
        cosine = torch.nn.functional.cosine_similarity(p.grad.double().flatten(), q.grad.flatten(), 0)
        assert float(cosine) > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    torch.manual_seed(0)
    fused = Stage()
    naive = copy.deepcopy(fused)
    naive.fused = False
    x = picture().detach().to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        ours, expected = fused(x)[-1], naive(x)[-1]
    exact = copy.deepcopy(naive).double()
    truth = exact(x.double())[-1]
    assert ours.dtype == dtype
    for y in (ours, expected, truth):
        y.double().square().mean().backward()

    def error(of: Stage, result: torch.Tensor) -> list[float]:
        pairs = [(result, truth), *((p.grad, q.grad) for p, q in zip(of.parameters(), exact.parameters(), strict=True))]
        return [float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in pairs]

    # The naive composition rounds x_l to half before it is normalised; the fused stage must not be less exact.
    ours_errors, naive_errors = error(fused, ours), error(naive, expected)
    assert all(p.grad.dtype == torch.float32 for p in fused.parameters())
    assert ours_errors[0] <= naive_errors[0] + torch.finfo(dtype).eps
    assert sum(ours_errors) <= sum(naive_errors)


@pytest.mark.slow
def test_compile_and_export():
    fused, naive = pair(blocks=2)
    x, y = picture(), picture()
    torch._dynamo.reset()
    explained = torch._dynamo.explain(fused)(x.detach())
    assert explained.graph_break_count == 0, explained.break_reasons
    compiled = torch.compile(copy.deepcopy(fused), backend="aot_eager", fullgraph=True)
    ours, expected = compiled(x), naive(y)
    loss_of_all(ours).backward()
    loss_of_all(expected).backward()
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(x.grad, y.grad)
    naive.load_state_dict(fused.state_dict())
    fused.eval(), naive.eval()
    program = torch.export.export(fused, (x.detach(),))
    torch.testing.assert_close(program.module()(x.detach()), naive(y.detach()))
