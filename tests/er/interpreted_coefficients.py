"""The Triton kernels of the algebra on C-vectors on the CPU, in Triton's interpreter, against the compiled operators.

Run by test_triton_interpreter.py in a process of its own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_coefficients import NORMS, assert_close, vectors

from ernet_fast.er.epilogue_arguments import BranchNorm, new_table, new_totals
from ernet_fast.er.triton import coefficient_launch as launch

COUNT, NORM_EPS, EPS = 30, 1e-2, 1e-3
COMPILED = torch.ops.ernet


def both(name: str, changed: list[Any], dtype: torch.dtype, *arguments: Any) -> tuple[torch.Tensor, ...]:
    """Results of the kernel, which must be those of the compiled operator, as must be all tensors that they change."""
    copies = [None if t is None else t.clone() for t in changed]
    mine = iter(copies)
    others = [next(mine) if any(x is t for t in changed if t is not None) else x for x in arguments]
    found = getattr(launch, name)(*arguments)
    wanted = getattr(COMPILED, name)(*others)
    for x, y in zip((*found, *changed), (*wanted, *copies), strict=True):
        if y is not None and y.dtype == torch.int64:
            assert torch.equal(x, y)
        elif y is not None:
            assert x.dtype == y.dtype
            assert_close(x.double(), y.double(), y.dtype if y.dtype.itemsize == 2 else dtype)
    return found


@pytest.mark.parametrize("use_running", [False, True])
@pytest.mark.parametrize(
    ("channels", "dtype", "kept_in", "norm"),
    [
        *itertools.product([3, 300], [torch.float32, torch.float64], [None], NORMS),
        *itertools.product([130], [torch.float32], [torch.bfloat16, torch.float16, torch.float64], NORMS[1:2]),
    ],
)
def test_a_stage(channels, dtype, kept_in, norm, use_running):
    blocks = vectors(channels, 4, norm, dtype)
    doubles = dtype == torch.float64
    table = new_table(torch.empty(1, channels, 1, 1, dtype=dtype), 4).zero_()
    count = torch.tensor([float(COUNT)], dtype=torch.float64) if use_running else None
    readers: list[torch.Tensor] = []
    for index, v in enumerate(blocks):
        v |= {name: v[name].to(kept_in or dtype) for name in ("norm_mean", "norm_var", "running_mean", "running_var")}
        v |= {name: v[name].to(kept_in or dtype) for name in ("gamma", "beta", "weight")}
        block, branch = index > 0, v["norm"]
        norms = (v["norm_mean"], v["norm_var"]) if branch != BranchNorm.NONE else (None, None)
        affine = (v["gamma"], v["beta"]) if index != 2 else (None, None)
        counters = torch.tensor(4) if branch == BranchNorm.BATCH else None, torch.tensor(8) if block else None
        weight, running = (v["weight"], (v["running_mean"], v["running_var"])) if block else (None, (None, None))
        momentum = None if index == 3 else 0.25
        changed = [table, *(norms if branch == BranchNorm.BATCH else ()), counters[0]]
        changed += [] if use_running else [*running, counters[1]]
        changed = [t for t in changed if t is not None]
        a, _ = both(
            "block_coefficients", changed, dtype, table, index, doubles, v["mean"], v["var"], count, COUNT, int(branch),
            *affine, *norms, counters[0], momentum, NORM_EPS, weight, *running, counters[1], use_running and block,
            momentum, EPS,
        )  # fmt: skip
        if block:
            readers.append(a)
    totals = new_totals(table)
    for index in reversed(range(4)):
        v, block = blocks[index], index > 0
        dots = (v["da"], v["db"]) if block and index != 2 else (None, None)
        both(
            "block_coefficients_backward", [totals], dtype, table, index, doubles, totals, *dots, count, COUNT,
            int(v["norm"]), v["weight"] if block else None, v["running_mean"] if block else None,
            v["running_var"] if block else None, use_running and block, EPS, readers[max(index - 1, 0) :],
            index != 1, not block,
        )  # fmt: skip


def test_operators_name_what_is_wrong():
    table = new_table(torch.empty(1, 3, 1, 1), 2)
    ones = torch.ones(3)
    good: dict[str, Any] = {
        "table": table, "index": 0, "doubles": False, "mean": ones, "var": ones, "count": None,
        "elements": 4, "norm": 1,
        "gamma": ones, "beta": ones, "norm_mean": None, "norm_var": None, "norm_batches": None, "norm_momentum": 0.1,
        "norm_eps": 1e-5, "weight": None, "running_mean": None, "running_var": None, "batches": None,
        "use_running": False, "momentum": 0.1, "eps": 1e-5,
    }  # fmt: skip
    launch.block_coefficients(**good)
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
            launch.block_coefficients(**(good | wrong))
    a = torch.ones(1, 3)
    for readers, message in [([a.double()], "readers must be"), ([a[:, :2]], "readers must be")]:
        with pytest.raises(RuntimeError, match=message):
            launch.block_coefficients_backward(
                table, 0, False, new_totals(table), None, None, None, 4, 0, None, None, None, False, 1e-5, readers,
                True, False,
            )  # fmt: skip
