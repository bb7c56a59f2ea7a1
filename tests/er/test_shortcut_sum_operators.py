"""The operators behind `er_shortcut_sum` on the CPU: threads, frozen inputs, counts of calls, errors."""

from __future__ import annotations

import pytest
import torch
from er_cases import DTYPES, LAYOUTS, maps_like, new_table

import ernet_fast
from ernet_fast.er import operators
from ernet_fast.er.epilogue_arguments import NO_NORM, TABLE_ROWS, ShortcutArguments
from ernet_fast.reference import er_shortcut_sum as reference

OPS = torch.ops.ernet


def leaves(shape, num_maps, dtype, layout):
    xs = [x.requires_grad_() for x in maps_like(shape, num_maps, dtype, layout)]
    weight = torch.randn(
        num_maps - 1, shape[1], dtype=operators.acc_dtype(xs[0]), generator=torch.Generator().manual_seed(1)
    )
    return xs, weight.requires_grad_()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_threads(dtype, layout):
    xs, weight = leaves((6, 37, 23, 29), 4, dtype, layout)

    def everything() -> list[torch.Tensor]:
        y = ernet_fast.er_shortcut_sum(xs, weight, relu=True)
        return [y, *torch.autograd.grad(y, [*xs, weight], torch.full_like(y, 0.5))]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = everything()
        for count in (2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(x, y) for x, y in zip(single, everything(), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strips_do_not_change_a_bit(dtype, relu):
    """Channels alone, too few for strips, have the bits that they have among others, which are cut into strips."""
    few = slice(10, 14)
    xs, weight = leaves((6, 37, 23, 29), 4, dtype, torch.contiguous_format)
    parts = [x.detach()[:, few].contiguous().requires_grad_() for x in xs]
    part_weight = weight.detach()[:, few].contiguous().requires_grad_()
    dy = torch.randn(xs[0].shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    y = ernet_fast.er_shortcut_sum(xs, weight, relu=relu)
    part = ernet_fast.er_shortcut_sum(parts, part_weight, relu=relu)
    assert torch.equal(y[:, few], part)
    gradients = torch.autograd.grad(y, [*xs, weight], dy)
    part_gradients = torch.autograd.grad(part, [*parts, part_weight], dy[:, few].contiguous())
    for whole, alone in zip(gradients, part_gradients, strict=True):
        assert torch.equal(whole[:, few], alone)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("wanted", [(0,), (1,), (3,), (4,), (0, 3), (1, 2, 4), (0, 1, 2, 3)])
def test_any_subset_of_inputs_may_be_frozen(wanted, relu):
    """Maps 0 to 3, of which 3 is the block's own, and 4, the weight."""
    xs, weight = leaves((2, 5, 4, 3), 4, torch.float64, torch.channels_last)
    exact = [t.detach().clone(memory_format=torch.preserve_format) for t in (*xs, weight)]
    for i, (t, e) in enumerate(zip((*xs, weight), exact, strict=True)):
        t.requires_grad_(i in wanted)
        e.requires_grad_(i in wanted)
    dy = torch.randn(xs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ernet_fast.er_shortcut_sum(xs, weight, relu=relu).backward(dy)
    reference(exact[:-1], exact[-1], relu=relu).backward(dy)
    for i, (t, e) in enumerate(zip((*xs, weight), exact, strict=True)):
        assert (t.grad is None) == (i not in wanted)
        if t.grad is not None:
            torch.testing.assert_close(t.grad, e.grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_with_running_statistics(layout):
    xs, weight = leaves((3, 5, 4, 3), 3, torch.float64, layout)
    running = {
        "running_mean": torch.randn(2, 5, dtype=torch.float64),
        "running_var": torch.rand(2, 5, dtype=torch.float64) + 0.5,
        "training": False,
    }
    assert torch.autograd.gradcheck(lambda *t: ernet_fast.er_shortcut_sum(t[:-1], t[-1], **running), (*xs, weight))


def test_one_operator_each_way():
    xs, weight = leaves((2, 5, 4, 3), 4, torch.float32, torch.channels_last)
    with torch.profiler.profile() as profile:
        ernet_fast.er_shortcut_sum(xs, weight, relu=True).sum().backward()
    ours = {event.key: event.count for event in profile.key_averages() if event.key.startswith("ernet::")}
    assert ours == {"ernet::er_block": 1, "ernet::shortcut_sum_backward": 1}


def test_moved_running_statistics_invalidate_what_was_saved():
    xs, _ = leaves((2, 5, 4, 3), 2, torch.float32, torch.contiguous_format)
    module = ernet_fast.ERShortcut(5, 1)
    scale = torch.ones(1, 5, requires_grad=True)
    product = (scale * module.running_mean).sum()
    module(xs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    x, y, z = (t.detach() for t in leaves((2, 3, 5, 4), 3, torch.float32, layout)[0])
    weight = torch.randn(2, 3)
    mean, var = torch.randn(2, 3), torch.rand(2, 3)
    utils = ("test_schema", "test_faketensor")  # no autograd of their own: the function around them has it
    for running in ((None, None, False), (mean, var, False), (mean, var, True)):
        table = new_table(x, 3)
        shortcut = ShortcutArguments(weight, *running[:2], None, running[2], 0.1)
        arguments = ([x, y, z], table, 0, not running[2], False, *NO_NORM, *shortcut, 1e-5, 0, True)
        torch.library.opcheck(OPS.er_block.default, arguments, test_utils=utils)
        _, a, _ = OPS.er_block(*arguments)
        used = (mean, var) if running[2] else (None, None)
        for mask, needed in ((z, [True, True]), (None, [False, True])):
            backward = (x, [x, y], mask, weight, table, a, *used, 1e-5, needed)
            torch.library.opcheck(OPS.shortcut_sum_backward.default, backward, test_utils=utils)


def test_operators_name_what_is_wrong():
    x, weight = torch.ones(2, 3, 4, 4), torch.ones(1, 3)
    table, a = torch.ones(2, TABLE_ROWS, 3, dtype=torch.float64), torch.ones(2, 3)

    def forward(maps=(x, x), weight=weight, mean=None, var=None, use=False):
        shortcut = ShortcutArguments(weight, mean, var, None, use, 0.1)
        return OPS.er_block(list(maps), table.clone(), 0, True, False, *NO_NORM, *shortcut, 1e-5, 0, False)

    def backward(dy=x, maps=(x,), weight=weight, table=table, a=a, mean=None, needed=(True,)):
        return OPS.shortcut_sum_backward(dy, list(maps), None, weight, table, a, mean, None, 1e-5, list(needed))

    for call, message in [
        (lambda: forward(maps=()), "at least one map"),
        (lambda: forward(maps=(x, x[:1])), "one shape"),
        (lambda: forward(maps=(x[:0], x[:0])), "must not be empty"),
        (lambda: forward(weight=torch.ones(2, 3)), r"weight must have shape \[1, 3\]; got \[2, 3\]"),
        (lambda: forward(mean=weight), "go together"),
        (lambda: forward(use=True), "use_running needs"),
        (lambda: forward(mean=torch.ones(1, 4), var=weight), r"running_mean must have shape \[1, 3\]"),
        (lambda: backward(maps=()), "at least one map"),
        (lambda: backward(dy=x.double()), "one dtype"),
        (lambda: backward(weight=weight.double()), "weight must be float32"),
        (lambda: backward(table=table[:1]), "table must have shape"),
        (lambda: backward(a=a[:1].contiguous()), r"a must have shape \[2, 3\]"),
        (lambda: backward(mean=weight), "go together"),
        (lambda: backward(needed=(True, True)), "one entry for each of the 1 maps; got 2"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()
