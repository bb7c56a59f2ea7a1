"""The algebra on per-channel vectors in one call, against the same algebra as differentiable PyTorch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from er_cases import new_table
from other_isa import ISAS, run_on

from ernet_fast.er.epilogue_arguments import BranchNorm
from ernet_fast.er.unfused_coefficients import MapStatistics, map_statistics, shortcut_coefficients

EPS, NORM_EPS, COUNT = 1e-3, 1e-2, 30
DTYPES = [torch.float32, torch.float64]
NORMS = list(BranchNorm)


def vectors(channels: int, num_maps: int, norm: BranchNorm, dtype: torch.dtype, seed: int = 0) -> list[dict[str, Any]]:
    """Everything that the blocks of a stage depend on, in `dtype`; map 0 is given as it is."""
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    blocks = []
    for index in range(num_maps):
        blocks.append(
            {
                "mean": random(channels) * 3,
                "var": random(channels).square() + 0.1,
                "gamma": random(channels),
                "beta": random(channels),
                "norm_mean": random(channels),
                "norm_var": random(channels).square() + 0.1,
                "weight": random(index, channels),
                "running_mean": random(index, channels),
                "running_var": random(index, channels).square() + 0.1,
                "da": random(index + 1, channels),
                "db": random(channels),
                "norm": BranchNorm.NONE if index == 0 else norm,
            }
        )
    return [{k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in block.items()} for block in blocks]


def expected(blocks: list[dict[str, Any]], use_running: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """a and b of every block but the first, by plain differentiable algebra; leaves get their gradients."""
    filed: list[MapStatistics] = []
    results = []
    for index, v in enumerate(blocks):
        scale = shift = None
        if v["norm"] != BranchNorm.NONE:
            mean, var = (v["mean"], v["var"]) if v["norm"] == BranchNorm.BATCH else (v["norm_mean"], v["norm_var"])
            scale = v["gamma"] / (var + NORM_EPS).sqrt()
            shift = v["beta"] - scale * mean
        last = map_statistics((v["mean"], v["var"]), scale, shift)
        if index:
            running = (v["running_mean"], v["running_var"]) if use_running else None
            results.append(shortcut_coefficients(v["weight"], filed, last, running, EPS, 1))
        filed.append(last)
    return results


def forward(table: torch.Tensor, index: int, v: dict[str, Any], use_running: bool, **other: Any) -> Any:
    arguments: dict[str, Any] = {
        "doubles": table.dtype == torch.float64 and v["da"].dtype == torch.float64,
        "mean": v["mean"],
        "var": v["var"],
        "count": None,
        "elements": COUNT,
        "norm": int(v["norm"]),
        "gamma": None,
        "beta": None,
        "norm_mean": None,
        "norm_var": None,
        "norm_batches": None,
        "norm_momentum": 0.1,
        "norm_eps": NORM_EPS,
        "weight": v["weight"] if index else None,
        "running_mean": v["running_mean"] if use_running and index else None,
        "running_var": v["running_var"] if use_running and index else None,
        "batches": None,
        "use_running": use_running and index > 0,
        "momentum": 0.1,
        "eps": EPS,
    }
    if v["norm"] != BranchNorm.NONE:
        arguments |= {"gamma": v["gamma"], "beta": v["beta"]}
    if v["norm"] == BranchNorm.RUNNING:
        arguments |= {"norm_mean": v["norm_mean"], "norm_var": v["norm_var"]}
    return torch.ops.ernet.block_coefficients.default(table, index, *(arguments | other).values())


def backward(table: torch.Tensor, index: int, blocks: list[dict[str, Any]], use_running: bool, **other: Any) -> Any:
    """Of map `index`, with what its own and all later blocks hold; each has `a`, and `dweight` to be written."""
    v, later = blocks[index], blocks[max(index, 0) + 1 :]
    own = [v["da"][index], v["db"]] if index else []
    sums = torch.stack([*(block["da"][index] for block in later), *own]).double() if later or own else None
    none = torch.empty(0)
    arguments: dict[str, Any] = {
        "sums": sums,
        "a": v["a"] if index else None,
        "later_a": [block["a"] for block in later],
        "later_db": [block["db"].double() for block in later],
        "later_weight": [block["weight"] for block in later],
        "later_running_mean": [block["running_mean"] if use_running else none for block in later],
        "later_running_var": [block["running_var"] if use_running else none for block in later],
        "later_dweight": [block["dweight"] for block in later],
        "count": None,
        "elements": COUNT,
        "norm": int(v["norm"]),
        "eps": EPS,
        "measured": True,
        "pass_on": False,
    }
    return torch.ops.ernet.map_coefficients_backward(table, index, *(arguments | other).values())


def stage_of(blocks: list[dict[str, Any]], use_running: bool) -> torch.Tensor:
    """The table of a stage of these blocks, which get their `a` and a `dweight` that holds NaN."""
    table = new_table(torch.empty(2, blocks[0]["mean"].shape[0], 3, 5, dtype=blocks[0]["mean"].dtype), len(blocks))
    for index, v in enumerate(blocks):
        v["a"], v["b"] = forward(table, index, v, use_running)
        v["dweight"] = torch.full_like(v["weight"], float("nan"))
    return table


def assert_close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    """Within 16 roundings of the largest term: results are sums of a dozen products of numbers of order 1."""
    wanted = wanted.detach()
    assert found.shape == wanted.shape
    error = float((found.double() - wanted.double()).abs().max()) if wanted.numel() else 0.0
    scale = max(1.0, float(wanted.abs().max()) if wanted.numel() else 0.0)
    assert error <= 16 * torch.finfo(dtype).eps * scale, (error, scale)


@pytest.mark.parametrize("use_running", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 65, 700])
def test_a_stage_forward_and_backward(channels, dtype, norm, use_running):
    blocks = vectors(channels, 4, norm, dtype)
    leaves = [
        {k: v.double().clone().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in block.items()}
        for block in blocks
    ]
    wanted = expected(leaves, use_running)
    loss = sum(
        (v["da"].detach() * a).sum() + (0 if b is None else (v["db"].detach() * b).sum())
        for (a, b), v in zip(wanted, leaves[1:], strict=True)
    )
    loss.backward()

    table = stage_of(blocks, use_running)
    for index, v in enumerate(blocks):
        assert v["a"].dtype == dtype and v["b"].dtype == dtype
        if index == 0:
            assert v["a"].shape == (0, channels) and v["b"].shape == (0,)
            continue
        assert_close(v["a"], wanted[index - 1][0], dtype)
        assert_close(v["b"], wanted[index - 1][1], dtype)

    for index in reversed(range(4)):
        v, leaf = blocks[index], leaves[index]
        rows, k0, dgamma, dbeta, dmoments = backward(table, index, blocks, use_running, pass_on=index == 0)
        zeros = torch.zeros(channels, dtype=torch.float64)
        dmean, dvar = (zeros if leaf[k].grad is None else leaf[k].grad for k in ("mean", "var"))
        assert_close(dmoments, torch.stack([dmean, dvar]), torch.float64 if dtype == torch.float64 else torch.float32)
        if v["norm"] == BranchNorm.NONE:
            assert dgamma.numel() == dbeta.numel() == 0
        else:
            assert_close(dgamma, leaf["gamma"].grad, dtype)
            assert_close(dbeta, leaf["beta"].grad, dtype)
        k1 = dvar * (2 / COUNT)
        kept = [block["a"][index] for block in blocks[max(index, 1) :]]
        assert torch.equal(rows[: len(kept)], torch.stack(kept))
        assert_close(rows[len(kept)], k1, dtype)
        assert_close(k0, dmean / COUNT - k1 * leaf["mean"].detach(), dtype)
        assert rows.dtype == dtype and rows.shape[0] == len(kept) + 1 + (index == 0)
        assert index or bool((rows[-1] == 1).all())
    for v, leaf in zip(blocks[1:], leaves[1:], strict=True):
        assert_close(v["dweight"], leaf["weight"].grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_map_without_inner_products(dtype):
    """Then rows alone are meant: readers and a gradient passed on; nothing is written to dweight."""
    blocks = vectors(5, 3, BranchNorm.BATCH, dtype)
    table = stage_of(blocks, False)
    rows, k0, dgamma, dbeta, dmoments = backward(table, 1, blocks, False, sums=None, measured=False, pass_on=True)
    assert torch.equal(rows, torch.stack([blocks[1]["a"][1], blocks[2]["a"][1], torch.ones(5, dtype=dtype)]))
    assert k0.numel() == dgamma.numel() == dbeta.numel() == 0
    assert dmoments.dtype == torch.float64 and not dmoments.any()
    assert bool(blocks[2]["dweight"].isnan().all())


def test_a_last_map_whose_output_has_no_gradient():
    """No later block, none of its own: a gradient passed on is all that there is."""
    blocks = vectors(5, 2, BranchNorm.NONE, torch.float32)
    table = stage_of(blocks, False)
    nothing = {"sums": torch.empty(0, 5, dtype=torch.float64), "a": None, "pass_on": True}
    rows, k0, *_, dmoments = backward(table, 1, blocks, False, **nothing)
    assert torch.equal(rows, torch.tensor([[0.0], [1.0]]).expand(2, 5))
    assert not k0.any() and not dmoments.any()


@pytest.mark.parametrize("kept_in", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_running_statistics_are_those_of_batch_norm(kept_in):
    """Moved as nn.BatchNorm2d moves its own and F.batch_norm those of N(x), in whatever dtype they are kept."""
    z0, z1 = (torch.randn(5, 7, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    bn = torch.nn.BatchNorm2d(7, eps=NORM_EPS, momentum=0.3).double()
    torch.nn.init.normal_(bn.weight), torch.nn.init.normal_(bn.bias)
    mean, var = torch.randn(1, 7).to(kept_in), torch.rand(1, 7).to(kept_in) + 1
    expected_mean, expected_var = mean[0].double(), var[0].double()
    torch.nn.functional.batch_norm(z0, expected_mean, expected_var, training=True, momentum=0.2)
    norm_mean, norm_var = bn.running_mean.to(kept_in, copy=True), bn.running_var.to(kept_in, copy=True)
    bn(z1)
    table = new_table(z0, 2)
    counters = torch.tensor(4), torch.tensor(8)
    for index, z in enumerate((z0, z1)):
        moments = {"mean": z.mean((0, 2, 3)), "var": z.var((0, 2, 3), correction=0)}
        v = {"norm": BranchNorm.NONE if index == 0 else BranchNorm.BATCH, "da": z, "weight": torch.ones(1, 7)}
        v |= {"gamma": bn.weight.detach(), "beta": bn.bias.detach(), **moments}
        more = {"norm_mean": norm_mean, "norm_var": norm_var, "norm_batches": counters[0], "norm_momentum": 0.3}
        more |= {"running_mean": mean, "running_var": var, "batches": counters[1], "momentum": 0.2}
        forward(table, index, v, False, elements=30, **(more if index else {}))
    assert [int(counter) for counter in counters] == [5, 9]
    for found, wanted in (
        (norm_mean, bn.running_mean),
        (norm_var, bn.running_var),
        (mean[0], expected_mean),
        (var[0], expected_var),
    ):
        torch.testing.assert_close(found.double(), wanted, rtol=2 * torch.finfo(kept_in).eps, atol=1e-15)


def test_cumulative_average():
    """momentum=None: the n-th batch has weight 1 / n."""
    table, running = new_table(torch.empty(1, 2, 1, 1), 1), torch.zeros(2)
    var, batches = torch.ones(2), torch.tensor(0)
    for n in range(1, 5):
        v = {"norm": BranchNorm.BATCH, "da": var, "mean": torch.full((2,), float(n)), "var": torch.ones(2)}
        v |= {"gamma": None, "beta": None, "weight": None}
        more = {"norm_mean": running, "norm_var": var, "norm_batches": batches, "norm_momentum": None}
        forward(table, 0, v, False, **more)
        torch.testing.assert_close(running, torch.full((2,), (n + 1) / 2))


def test_a_large_mean_costs_no_digits():
    """Constants belong to the coefficients as they are rounded: a z + b at z = mean is exact to roundoff of b."""
    v0, v1 = vectors(512, 2, BranchNorm.BATCH, torch.float32)
    for v in (v0, v1):
        v["mean"] = v["mean"] + 1e4
    table = new_table(torch.empty(1, 512, 1, 1), 2)
    forward(table, 0, v0, False)
    a, b = forward(table, 1, v1, False)
    y = (a.double() * torch.stack([v0["mean"], v1["mean"]]).double()).sum(0) + b.double()  # N(x_0) = 0, x_1 = beta
    error = (y - v1["beta"].double()).abs()
    assert float((error / b.abs()).max()) <= torch.finfo(torch.float32).eps


def test_count_from_a_tensor():
    v0, v1 = vectors(5, 2, BranchNorm.BATCH, torch.float64)
    table = new_table(torch.empty(1, 5, 1, 1, dtype=torch.float64), 2)
    count = torch.tensor([float(COUNT)], dtype=torch.float64)
    results = []
    for kw in ({}, {"count": count, "elements": -1}):
        norm_mean, norm_var = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
        forward(table, 0, v0, False, **kw)
        a, b = forward(table, 1, v1, False, norm_mean=norm_mean, norm_var=norm_var, **kw)
        v1["a"] = a
        results.append([a, b, norm_mean, norm_var, *backward(table, 1, [v0, v1], False, **kw)])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("use_running", [False, True])
def test_opcheck(norm, use_running):
    v0, v1 = vectors(3, 2, norm, torch.float32)
    table = new_table(torch.empty(1, 3, 1, 1), 2)
    forward(table, 0, v0, False)
    running = (v1["norm_mean"], v1["norm_var"]) if norm == BranchNorm.RUNNING else (torch.zeros(3), torch.ones(3))
    gamma, beta = (None, None) if norm == BranchNorm.NONE else (v1["gamma"], v1["beta"])
    moved = (v1["running_mean"], v1["running_var"], torch.tensor(0), use_running)
    batches = torch.tensor(0) if norm == BranchNorm.BATCH else None
    arguments = (v1["mean"], v1["var"], None, COUNT, int(norm), gamma, beta, *running, batches, 0.1, NORM_EPS)
    # They have no autograd of their own.
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.ernet.block_coefficients.default,
        (table, 1, False, *arguments, v1["weight"], *moved, None, EPS),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.ernet.block_coefficients.default,
        (table, 0, False, *arguments, None, None, None, None, False, 0.0, EPS),
        test_utils=checks,
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("use_running", [False, True])
def test_opcheck_backward(norm, use_running):
    blocks = vectors(3, 3, norm, torch.float32)
    table = stage_of(blocks, use_running)
    none = [torch.empty(0)]
    later = [[blocks[2]["a"]], [blocks[2]["db"].double()], [blocks[2]["weight"]]]
    later += [[blocks[2][name]] if use_running else none for name in ("running_mean", "running_var")]
    dweight = [torch.zeros(2, 3)]
    for sums, a, measured, pass_on in (
        (torch.randn(3, 3, dtype=torch.float64), blocks[1]["a"], True, True),
        (torch.randn(1, 3, dtype=torch.float64), None, True, False),
        (None, blocks[1]["a"], False, False),
    ):
        arguments = (table, 1, sums, a, *later, dweight, None, COUNT, int(norm), EPS, measured, pass_on)
        operator = torch.ops.ernet.map_coefficients_backward.default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_errors_come_before_any_change():
    v0, v1 = vectors(3, 2, BranchNorm.BATCH, torch.float32)
    table = new_table(torch.empty(1, 3, 1, 1), 2)
    forward(table, 0, v0, False)
    before, mean, batches = table.clone(), torch.zeros(3), torch.tensor(0)
    moving = {"norm_mean": mean, "norm_var": torch.ones(3), "norm_batches": batches}
    for other, message in [
        ({"mean": torch.zeros(4)}, r"mean must have shape \[3\]; got \[4\]"),
        ({"var": None}, "mean and var go together"),
        ({"mean": None, "var": None}, r"norm 1 \(batch\) needs mean and var"),
        ({"gamma": torch.ones(3, dtype=torch.int32)}, "gamma must be float32, float64"),
        ({"gamma": torch.ones(6)[::2]}, "gamma must be contiguous"),
        ({"weight": torch.ones(2, 3)}, r"weight must have shape \[1, 3\]; got \[2, 3\]"),
        ({"norm": 3}, "norm must be 0"),
        ({"norm": 2, **dict.fromkeys(moving)}, "needs norm_mean and norm_var"),
        ({"running_mean": torch.zeros(1, 3)}, "running_mean and running_var go together"),
        ({"count": torch.ones(1)}, "count must be one float64 number"),
        ({"norm_batches": torch.tensor(0.0)}, "norm_batches must be one int64 number"),
        ({"norm_batches": None, "norm_momentum": None}, r"momentum of None .* needs norm_batches"),
        ({"running_mean": v1["running_mean"], "running_var": v1["running_var"], "momentum": None}, "needs batches"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            forward(table, 1, v1, False, **(moving | other))
        assert torch.equal(table, before) or bool(table.isnan().any())
        assert not mean.any() and int(batches) == 0, message
    with pytest.raises(RuntimeError, match="use_running needs"):
        forward(table, 1, v1, True, running_mean=None, running_var=None)
    with pytest.raises(RuntimeError, match="index 2 is outside the 2 maps of table"):
        forward(table, 2, v1 | {"weight": torch.ones(2, 3)}, False)
    with pytest.raises(RuntimeError, match="table must be a contiguous float64 tensor"):
        forward(table.float(), 1, v1, False)


def test_errors_of_the_backward():
    blocks = vectors(3, 3, BranchNorm.BATCH, torch.float32)
    table = stage_of(blocks, False)
    for other, message in [
        ({"sums": torch.ones(2, 3, dtype=torch.float64)}, r"sums must have shape \[3, 3\]; got \[2, 3\]"),
        ({"sums": torch.ones(3, 3)}, "sums must be float64"),
        ({"a": torch.ones(1, 3)}, r"a must be contiguous tensors \[> 1, 3\] of float32; got \[1, 3\]"),
        ({"later_a": [torch.ones(2, 4)]}, r"later_a must be contiguous tensors \[> 1, 3\]"),
        ({"later_a": []}, "one entry for each of the 0"),
        ({"later_db": [torch.ones(4)]}, r"later_db must have shape \[3\]; got \[4\]"),
        ({"later_db": [torch.ones(3)]}, "later_db must be float64"),
        ({"later_weight": [torch.ones(1, 3)]}, "later_weight must have rows for map 1"),
        ({"later_running_mean": [torch.ones(2, 3)]}, "go together"),
        ({"later_dweight": [torch.ones(2, 3).double()]}, "later_dweight must be contiguous tensors"),
        ({"count": torch.ones(1)}, "count must be one float64 number"),
        ({"norm": 5}, "norm must be 0"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            backward(table, 1, blocks, False, **other)
    with pytest.raises(RuntimeError, match="index 4 is outside the 3 maps of table"):
        torch.ops.ernet.map_coefficients_backward(
            table, 4, None, None, [], [], [], [], [], [], None, COUNT, 0, EPS, False, False
        )


EVERY_LOOP = """
for norm in tests.NORMS:
    for dtype in tests.DTYPES:
        for use_running in (False, True):
            tests.test_a_stage_forward_and_backward(700, dtype, norm, use_running)
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    run_on(isa, __file__, EVERY_LOOP)
