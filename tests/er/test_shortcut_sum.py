"""`er_shortcut_sum` and `ERShortcut` against the float64 reference: values, gradients, running statistics, errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from er_cases import DTYPES, LAYOUTS, maps_like, relative_error, tolerance

import ernet_fast
from ernet_fast.reference import er_shortcut_sum as reference

SHAPES = [(2, 6, 7, 11), (3, 33, 1, 5), (1, 66, 9, 9), (4, 3, 1, 1)]
NORMS = [("batch", None), ("group", 1), ("group", 3)]
# Not a group of one value: it normalises to exactly 0, and what is left of every gradient is rounding noise.
DOUBLE_CASES = [(shape, *norm) for shape in SHAPES for norm in NORMS if (shape, norm[1]) != ((4, 3, 1, 1), 3)]


def compare(xs, weight, grad_tolerance, **options):
    """Run both on copies; compare the result and every gradient."""
    inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in (*xs, weight)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    y = ernet_fast.er_shortcut_sum(inputs[:-1], inputs[-1], **options)
    expected = reference(exact[:-1], exact[-1], **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    y.backward(dy)
    expected.backward(dy.double())
    errors = [relative_error(x.grad, e.grad) for x, e in zip(inputs, exact, strict=True) if x.numel()]
    assert max(errors) <= grad_tolerance, errors
    return y, expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("shape", "norm", "groups"), DOUBLE_CASES)
def test_equals_the_reference_in_double(shape, norm, groups, relu, layout):
    for num_maps in (1, 2, 5):
        xs = maps_like(shape, num_maps, torch.float64, layout)
        weight = torch.randn(num_maps - 1, shape[1], dtype=torch.float64)
        y, expected = compare(xs, weight, 1e-10, norm=norm, num_groups=groups, relu=relu)
        assert relative_error(y, expected) <= 1e-12
        assert y.stride() == xs[-1].stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("norm", "groups"), NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference_in_every_dtype(dtype, norm, groups, layout):
    xs = maps_like((4, 6, 13, 9), 4, dtype, layout)
    weight = torch.randn(3, 6, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    terms = 4 * 13 * 9
    # a gradient is stored in the dtype of its map, and g itself was rounded to it
    y, expected = compare(xs, weight, 4 * tolerance(dtype, terms), norm=norm, num_groups=groups)
    assert y.dtype == dtype
    assert relative_error(y, expected) <= tolerance(dtype, terms)


@pytest.mark.parametrize(("norm", "groups"), NORMS)
def test_gradcheck(norm, groups):
    xs = maps_like((2, 3, 3, 2), 3, torch.float64, torch.contiguous_format)
    inputs = [t.requires_grad_() for t in (*xs, torch.randn(2, 3, dtype=torch.float64))]

    def function(*t):
        return ernet_fast.er_shortcut_sum(t[:-1], t[-1], norm=norm, num_groups=groups)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("kind", ["tensor", "list"])
def test_running_statistics(kind):
    xs = maps_like((3, 5, 4, 7), 4, torch.float32, torch.contiguous_format)
    weight = torch.randn(3, 5)
    mean, var = torch.randn(3, 5), torch.rand(3, 5)
    expected_mean, expected_var = mean.clone(), var.clone()
    for _ in range(3):
        given = (mean, var) if kind == "tensor" else (list(mean.unbind(0)), list(var.unbind(0)))
        ernet_fast.er_shortcut_sum(xs, weight, running_mean=given[0], running_var=given[1], momentum=0.3)
        reference(xs, weight, running_mean=expected_mean, running_var=expected_var, momentum=0.3)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(var, expected_var)
    kept = mean.clone()
    y = ernet_fast.er_shortcut_sum(xs, weight, running_mean=mean, running_var=var, training=False)
    torch.testing.assert_close(y, reference(xs, weight, running_mean=mean, running_var=var, training=False))
    assert torch.equal(mean, kept)


def test_strided_and_mixed_maps():
    wide = maps_like((2, 6, 8, 10), 3, torch.float64, torch.contiguous_format)
    xs = [x[:, :, ::2, 1:8] for x in wide]
    xs[1] = xs[1].contiguous(memory_format=torch.channels_last)
    weight = torch.randn(2, 6, dtype=torch.float64)
    y, expected = compare(xs, weight, 1e-10)
    assert relative_error(y, expected) <= 1e-12


def test_expanded_gradients_and_frozen_maps():
    xs = maps_like((2, 3, 4, 4), 3, torch.float64, torch.channels_last)
    xs[1].requires_grad_()
    weight = torch.randn(2, 3, dtype=torch.float64)
    ernet_fast.er_shortcut_sum(xs, weight).sum().backward()  # dy is an expanded scalar
    exact = [x.detach().clone() for x in xs]
    exact[1].requires_grad_()
    reference(exact, weight).sum().backward()
    torch.testing.assert_close(xs[1].grad, exact[1].grad)
    assert xs[0].grad is None


def test_inputs_are_not_modified():
    xs = maps_like((2, 6, 5, 5), 3, torch.float32, torch.contiguous_format)
    weight = torch.randn(2, 6)
    before = [x.clone() for x in (*xs, weight)]
    ernet_fast.er_shortcut_sum(xs, weight, relu=True)
    assert all(torch.equal(x, kept) for x, kept in zip((*xs, weight), before, strict=True))


def test_empty_batch():
    xs = [torch.ones(0, 3, 4, 4, requires_grad=True) for _ in range(2)]
    mean, var = torch.zeros(1, 3), torch.ones(1, 3)
    y = ernet_fast.er_shortcut_sum(xs, torch.ones(1, 3), running_mean=mean, running_var=var)
    y.sum().backward()
    assert y.shape == (0, 3, 4, 4) and xs[0].grad.shape == (0, 3, 4, 4)
    assert torch.equal(mean, torch.zeros(1, 3)) and torch.equal(var, torch.ones(1, 3))


def test_nan_propagates_as_in_the_reference():
    xs = maps_like((2, 3, 4, 4), 3, torch.float32, torch.contiguous_format)
    xs[0][0, 1, 2, 3] = float("nan")
    y, expected = ernet_fast.er_shortcut_sum(xs, torch.ones(2, 3)), reference(xs, torch.ones(2, 3))
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert bool(y[:, 1].isnan().all()) and not bool(y[:, [0, 2]].isnan().any())


def test_second_derivative_is_a_clear_error():
    xs = [x.requires_grad_() for x in maps_like((2, 3, 2, 2), 2, torch.float64, torch.contiguous_format)]
    y = ernet_fast.er_shortcut_sum(xs, torch.ones(1, 3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="no second derivative.*reference"):
        torch.autograd.grad(y.square().sum(), xs, create_graph=True)


X = torch.ones(2, 6, 3, 3)
W = torch.ones(1, 6)


@pytest.mark.parametrize("function", [ernet_fast.er_shortcut_sum, reference])
@pytest.mark.parametrize(
    ("xs", "weight", "options", "error", "message"),
    [
        ([], W, {}, ValueError, "xs is empty"),
        (X, W, {}, TypeError, "sequence of maps"),
        ([X, 3], W, {}, TypeError, r"xs\[1\] is a int"),
        ([X, X[0]], W, {}, ValueError, r"xs\[1\] has shape \(6, 3, 3\); expected 4"),
        ([X, X[:1]], W, {}, ValueError, r"xs\[1\] has shape .* but xs\[0\]"),
        ([X, X.double()], W, {}, TypeError, r"xs\[1\] is torch.float64 but xs\[0\]"),
        ([X.int(), X.int()], W, {}, TypeError, r"xs\[0\] is torch.int32"),
        ([X, X], torch.ones(2, 6), {}, ValueError, r"weight has shape \(2, 6\); expected \(1, 6\)"),
        ([X, X], torch.ones(1, 5), {}, ValueError, r"weight has shape \(1, 5\); expected \(1, 6\)"),
        ([X, X], W.int(), {}, TypeError, "weight is torch.int32"),
        ([X, X], W.to("meta"), {}, ValueError, "weight is on meta"),
        ([X, X], W, {"norm": "layer"}, ValueError, "norm is 'layer'; expected"),
        ([X, X], W, {"norm": "group"}, ValueError, "needs num_groups"),
        ([X, X], W, {"norm": "group", "num_groups": 4}, ValueError, "num_groups=4 does not divide the 6"),
        ([X, X], W, {"num_groups": 2}, ValueError, "no meaning with norm='batch'"),
        ([X, X], W, {"training": False}, ValueError, "needs running_mean and running_var"),
        ([X, X], W, {"running_mean": torch.ones(1, 6)}, ValueError, "go together"),
        ([X, X], W, {"running_mean": torch.ones(2, 6), "running_var": torch.ones(2, 6)}, ValueError, "has 2 entries"),
        (
            [X, X],
            W,
            {"running_mean": torch.ones(1, 5), "running_var": torch.ones(1, 5)},
            ValueError,
            r"\(5,\); expected \(6,\)",
        ),
        ([X, X], W, {"eps": -1.0}, ValueError, "eps is -1.0"),
        ([X[:1, :, :1, :1]] * 2, W, {}, ValueError, "one value a channel"),
    ],
)
def test_bad_arguments_are_named(function, xs, weight, options, error, message):
    with pytest.raises(error, match=message):
        function(xs, weight, **options)


@pytest.mark.parametrize(("norm", "groups"), NORMS)
def test_module_fused_and_naive_agree(norm, groups):
    fused = ernet_fast.ERShortcut(6, 3, norm=norm, num_groups=groups).double()
    torch.nn.init.normal_(fused.weight)
    naive = copy.deepcopy(fused)
    naive.fused = False
    for step in range(3):
        xs = maps_like((3, 6, 5, 4), 4, torch.float64, torch.contiguous_format, seed=step)
        torch.testing.assert_close(fused(xs), naive(xs))
    fused.eval(), naive.eval()
    torch.testing.assert_close(fused(xs), naive(xs))
    torch.testing.assert_close(fused.state_dict(), naive.state_dict())
    restored = pickle.loads(pickle.dumps(fused))
    torch.testing.assert_close(restored(xs), fused(xs))


def test_module_cumulative_average():
    """momentum=None: the running mean is the plain mean over the batches seen."""
    module = ernet_fast.ERShortcut(3, 1, momentum=None)
    batches = [maps_like((4, 3, 5, 5), 2, torch.float32, torch.contiguous_format, seed=s) for s in range(3)]
    for xs in batches:
        module(xs)
    expected = torch.stack([xs[0].mean((0, 2, 3)) for xs in batches]).mean(0, keepdim=True)
    torch.testing.assert_close(module.running_mean, expected)
    assert int(module.num_batches_tracked) == 3


def test_module_bad_arguments():
    with pytest.raises(ValueError, match="num_maps=0"):
        ernet_fast.ERShortcut(3, 0)
    with pytest.raises(ValueError, match="does not divide"):
        ernet_fast.ERShortcut(3, 1, norm="group", num_groups=2)
