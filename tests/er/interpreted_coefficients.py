"""The Triton kernels of the algebra on per-channel vectors on the CPU, in Triton's interpreter.

Forward against the compiled operator, backward against autograd.

Run by test_triton_interpreter.py in a process of its own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from map_gradient_cases import Stage
from test_coefficients import NORMS, assert_close, vectors

from ernet_fast.er.epilogue_arguments import TABLE_ROWS, BranchNorm
from ernet_fast.er.triton import coefficient_launch as launch

COUNT, NORM_EPS, EPS = 30, 1e-2, 1e-3


def forward(changed: list[Any], dtype: torch.dtype, *arguments: Any) -> None:
    """Results of the kernel must be those of the compiled operator, as must be all tensors that they change."""
    copies = [None if t is None else t.clone() for t in changed]
    mine = iter(copies)
    others = [next(mine) if any(x is t for t in changed if t is not None) else x for x in arguments]
    found = launch.block_coefficients(*arguments)
    wanted = torch.ops.ernet.block_coefficients(*others)
    for x, y in zip((*found, *changed), (*wanted, *copies), strict=True):
        if y is not None and y.dtype == torch.int64:
            assert torch.equal(x, y)
        elif y is not None:
            assert x.dtype == y.dtype
            assert_close(x.double(), y.double(), y.dtype if y.dtype.itemsize == 2 else dtype)


def backward(arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    return launch.map_coefficients_backward(**arguments)


@pytest.mark.parametrize("use_running", [False, True])
@pytest.mark.parametrize(
    ("channels", "dtype", "kept_in", "norm"),
    [
        *itertools.product([3, 300], [torch.float32, torch.float64], [None], NORMS),
        *itertools.product([130], [torch.float32], [torch.bfloat16, torch.float16, torch.float64], NORMS[1:2]),
    ],
)
def test_coefficients_of_a_stage(channels, dtype, kept_in, norm, use_running):
    blocks = vectors(channels, 4, norm, dtype)
    doubles = dtype == torch.float64
    table = torch.zeros(4, TABLE_ROWS, channels, dtype=torch.float64)
    count = torch.tensor([float(COUNT)], dtype=torch.float64) if use_running else None
    for index, v in enumerate(blocks):
        v |= {name: v[name].to(kept_in or dtype) for name in ("norm_mean", "norm_var", "running_mean", "running_var")}
        v |= {name: v[name].to(kept_in or dtype) for name in ("gamma", "beta", "weight")}
        block, branch = index > 0, v["norm"]
        norms = (v["norm_mean"], v["norm_var"]) if branch != BranchNorm.NONE else (None, None)
        affine = (v["gamma"], v["beta"]) if index != 2 else (None, None)
        counters = torch.tensor(4) if branch == BranchNorm.BATCH else None, torch.tensor(8) if block else None
        weight, running = (v["weight"], (v["running_mean"], v["running_var"])) if block else (None, (None, None))
        momentum = None if index == 3 else 0.1  # which float32 does not hold
        changed = [table, *(norms if branch == BranchNorm.BATCH else ()), counters[0]]
        changed += [] if use_running else [*running, counters[1]]
        changed = [t for t in changed if t is not None]
        forward(
            changed, dtype, table, index, doubles, v["mean"], v["var"], count, COUNT, int(branch),
            *affine, *norms, counters[0], momentum, NORM_EPS, weight, *running, counters[1], use_running and block,
            momentum, EPS,
        )  # fmt: skip


@pytest.mark.parametrize("running", [[False] * 3, [True] * 3, [True, False, True]])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("channels", "dtype"), [(3, torch.float64), (130, torch.float32), (256, torch.float32)])
def test_gradients_of_a_stage(channels, dtype, norm, running):
    """By map, from the last to the first, against autograd in float64."""
    stage = Stage(channels, norm, dtype, running)
    for index in reversed(range(4)):
        arguments = stage.arguments(index, measured=index != 1, pass_on=index == 0)
        stage.check(arguments, backward(arguments))
    assert not any(bool(dweight.isnan().any()) for dweight in stage.dweight)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reached", [[True, False, True], [False, True, False], [False] * 3])
def test_blocks_without_a_gradient(reached, norm):
    """They have no entry, and a map whose own block has none has no `a`."""
    stage = Stage(5, norm, torch.float32, [False] * 3, reached)
    for index in reversed(range(4)):
        arguments = stage.arguments(index, pass_on=index == 2)
        stage.check(arguments, backward(arguments))
    for index, dweight in enumerate(stage.dweight):
        assert bool(dweight.isnan().any()) is (index > 0 and not stage.reached[index])


@pytest.mark.parametrize("num_later", [1, 2, 4, 5, 16, 17, 33])
def test_many_later_blocks(num_later):
    """More than are loaded together, and more than one launch takes; every third with running statistics."""
    stage = Stage(3, BranchNorm.BATCH, torch.float64, [k % 3 == 1 for k in range(num_later + 1)])
    for index in (0, 1):
        arguments = stage.arguments(index)
        stage.check(arguments, backward(arguments))


@pytest.mark.parametrize("kept_in", [torch.float64, torch.bfloat16, torch.float16])
def test_vectors_in_other_dtypes(kept_in):
    """Weights and running statistics as a module may keep them: results are those of the same values in float32."""
    stage = Stage(7, BranchNorm.BATCH, torch.float32, [True, False])
    lists = ("later_weight", "later_running_mean", "later_running_var")
    arguments = stage.arguments(0)
    rounded = {name: [t.to(kept_in) for t in arguments[name]] for name in lists}
    same = {name: [t.float() for t in values] for name, values in rounded.items()}
    results = []
    for other in (rounded, same):
        dweight = [torch.full_like(t, torch.nan) for t in arguments["later_dweight"]]
        results.append([*backward(arguments | other | {"later_dweight": dweight}), *(t[0] for t in dweight)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_count_over_processes():
    stage = Stage(5, BranchNorm.BATCH, torch.float64, [False])
    count = torch.tensor([float(COUNT)], dtype=torch.float64)
    for index in (1, 0):
        arguments = stage.arguments(index, count=count, elements=-1)
        stage.check(arguments, backward(arguments))


@pytest.mark.parametrize("norm", NORMS)
def test_without_inner_products(norm):
    """Rows alone: no parameter and no moment depends on the map's gradient."""
    stage = Stage(5, norm, torch.float32, [False] * 3)
    none: list[torch.Tensor] = [torch.empty(0)] * 2
    lists = dict.fromkeys(("later_db", "later_weight", "later_running_mean", "later_running_var"), none)
    arguments = stage.arguments(1, sums=None, measured=False, pass_on=True) | lists
    rows, k0, dgamma, dbeta, dmoments = backward(arguments)
    assert torch.equal(rows, torch.stack([*(stage.a[k][1] for k in (1, 2, 3)), torch.ones(5)]))
    assert k0.numel() == dgamma.numel() == dbeta.numel() == 0
    assert torch.equal(dmoments, torch.zeros(2, 5, dtype=torch.float64))
    assert all(bool(dweight.isnan().all()) for dweight in arguments["later_dweight"])
    nothing = {name: [] for name in arguments if name.startswith("later_")}
    rows, k0, *_ = backward(arguments | nothing | {"a": None, "measured": True, "pass_on": False})
    assert torch.equal(rows, torch.zeros(1, 5)) and torch.equal(k0, torch.zeros(5))


def test_no_channels():
    stage = Stage(0, BranchNorm.BATCH, torch.float32, [False])
    rows, k0, dgamma, dbeta, dmoments = backward(stage.arguments(0))
    assert rows.shape == (2, 0) and dmoments.shape == (2, 0) and k0.shape == dgamma.shape == dbeta.shape == (0,)


def test_operators_name_what_is_wrong():
    table = torch.empty(2, TABLE_ROWS, 3, dtype=torch.float64)
    ones = torch.ones(3)
    good: dict[str, Any] = {
        "table": table, "index": 0, "doubles": False, "mean": ones, "var": ones, "count": None,
        "elements": 4, "norm": 1,
        "gamma": ones, "beta": ones, "norm_mean": None, "norm_var": None, "norm_batches": None, "norm_momentum": 0.1,
        "norm_eps": 1e-5, "weight": None, "running_mean": None, "running_var": None, "batches": None,
        "use_running": False, "momentum": 0.1, "eps": 1e-5,
    }  # fmt: skip
    launch.block_coefficients(*good.values())
    moving = {"norm_mean": ones.clone(), "norm_var": ones.clone()}
    for wrong, message in [
        ({"mean": torch.ones(4)}, r"mean must have shape \[3\]; got \[4\]"),
        ({"var": None}, "mean and var go together"),
        ({"mean": None, "var": None}, "needs mean and var"),
        ({"gamma": ones.int()}, "gamma must be float32"),
        ({"gamma": ones.to("meta")}, "gamma must be on the device of the table"),
        ({"gamma": torch.ones(6)[::2]}, "gamma must be contiguous"),
        ({"norm": 2}, "needs norm_mean and norm_var"),
        ({"use_running": True}, "use_running needs"),
        ({"index": 2}, "index 2 is outside the 2 maps of table"),
        ({"table": table.float()}, "table must be a contiguous float64 tensor"),
        ({"count": ones}, "count must be one float64 number"),
        (moving | {"norm_batches": torch.tensor(1.0)}, "norm_batches must be one int64 number"),
        (moving | {"norm_momentum": None}, "momentum of None .* needs norm_batches"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            launch.block_coefficients(*(good | wrong).values())


def test_gradients_name_what_is_wrong():
    stage = Stage(3, BranchNorm.BATCH, torch.float32, [True, False])
    good, a, b = stage.arguments(1), torch.ones(3, 3), torch.ones(3)
    for wrong, message in [
        ({"table": stage.table.float()}, "table must be a contiguous float64 tensor"),
        ({"index": 3}, "index 3 is outside the 3 maps of table"),
        ({"norm": 3}, r"norm must be 0 \(none\), 1 \(batch\) or 2 \(running\); got 3"),
        ({"count": b}, "count must be one float64 number"),
        ({"sums": torch.ones(3, 3)}, "sums must be float64; got torch.float32"),
        ({"sums": torch.ones(2, 3).double()}, r"sums must have shape \[3, 3\]; got \[2, 3\]"),
        ({"a": a}, r"a must have shape \[2, 3\]; got \[3, 3\]"),
        ({"later_a": [a.double()]}, "a and later_a must all be float32"),
        ({"later_a": [a.half()], "a": None, "sums": None}, "must all be float32"),
        ({"later_a": [a[:1]]}, r"later_a\[0\] must have shape \[2, 3\]; got \[1, 3\]"),
        ({"later_a": [torch.ones(3, 6)[:, ::2]]}, r"later_a\[0\] must be contiguous"),
        ({"later_db": []}, "later_db must have one tensor for each of the 1 of later_a; got 0"),
        ({"later_db": [b]}, r"later_db\[0\] must be float64"),
        ({"later_weight": [a.int()]}, r"later_weight\[0\] must be float32, float64, bfloat16 or float16"),
        ({"later_weight": [a.to("meta")]}, r"later_weight\[0\] must be on the device of the table"),
        ({"later_running_mean": [a]}, r"later_running_mean\[0\] and later_running_var\[0\] go together"),
        ({"later_dweight": [b]}, r"later_dweight\[0\] must have shape"),
        ({"later_dweight": [a.bfloat16()]}, r"later_dweight\[0\] must be torch.float32"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            backward(good | wrong)
    assert all(bool(dweight.isnan().all()) for dweight in stage.dweight)
