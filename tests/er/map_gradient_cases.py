"""Cases of `map_coefficients_backward`, and its results by differentiating plain formulas in float64.

    x_i = scale_i z_i + shift_i
    a_{l,i} = w_{l,i} scale_i / sqrt(var(x_i) + eps),   a_{l,l} = scale_l
    b_l = shift_l + sum_i w_{l,i} (shift_i - mean(x_i)) / sqrt(var(x_i) + eps)

With inner products da_{l,i} and sums db_l given, the gradients are those of sum da_{l,i} a_{l,i} + db_l b_l.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from test_coefficients import COUNT, EPS, NORM_EPS, assert_close, vectors
from torch import Tensor

from ernet_fast.er.epilogue_arguments import TABLE_ROWS, BranchNorm


class Stage:
    """Map 0, and a block for each of `running`, which says what it normalises earlier maps with.

    Blocks that are not `reached` have no gradient.
    """

    def __init__(
        self,
        channels: int,
        norm: BranchNorm,
        dtype: torch.dtype,
        running: Sequence[bool],
        reached: Sequence[bool] | None = None,
    ) -> None:
        self.channels, self.dtype, self.running = channels, dtype, [False, *running]
        self.reached = [False, *(reached or [True] * len(running))]
        self.blocks = vectors(channels, len(self.running), norm, dtype)
        self.a = [torch.randn(index + 1, channels).to(dtype) for index in range(len(self.blocks))]
        self.table = torch.empty(len(self.blocks), TABLE_ROWS, channels, dtype=torch.float64)
        self.leaves = [
            {name: v.double().clone().requires_grad_() for name, v in block.items() if isinstance(v, Tensor)}
            for block in self.blocks
        ]
        self._differentiate()
        self.dweight = [torch.full_like(block["weight"], torch.nan) for block in self.blocks]

    def _differentiate(self) -> None:
        """Fill the table; leaves get their gradients."""
        maps: list[tuple[Tensor, ...]] = []  # scale, shift, mean and variance of x
        loss = torch.zeros((), dtype=torch.float64)
        for index, (v, block) in enumerate(zip(self.leaves, self.blocks, strict=True)):
            zeros, ones = torch.zeros_like(v["mean"]), torch.ones_like(v["mean"])
            scale, rstd, centre, shift = ones, zeros, zeros, zeros
            if block["norm"] != BranchNorm.NONE:
                batch = block["norm"] == BranchNorm.BATCH
                centre, rstd = v["mean" if batch else "norm_mean"], v["var" if batch else "norm_var"] + NORM_EPS
                rstd = rstd.rsqrt()
                scale = v["gamma"] * rstd
                shift = v["beta"] - scale * centre
            x_mean, x_var = scale * v["mean"] + shift, scale.square() * v["var"]
            rows = (scale, rstd, centre, shift, v["mean"], v["var"], (x_var + EPS).rsqrt())
            self.table[index] = torch.stack(rows).detach()
            if self.reached[index]:
                b = shift
                loss = loss + (v["da"].detach()[index] * scale).sum()
                for i, (scale_i, shift_i, mean_i, var_i) in enumerate(maps):
                    if self.running[index]:
                        mean_i, var_i = v["running_mean"][i].detach(), v["running_var"][i].detach()
                    weight = v["weight"][i] * (var_i + EPS).rsqrt()
                    b = b + weight * (shift_i - mean_i)
                    loss = loss + (v["da"].detach()[i] * weight * scale_i).sum()
                loss = loss + (v["db"].detach() * b).sum()
            maps.append((scale, shift, x_mean, x_var))
        if loss.requires_grad:
            loss.backward()

    def later(self, index: int) -> list[int]:
        """Later blocks that have a gradient."""
        return [k for k in range(index + 1, len(self.blocks)) if self.reached[k]]

    def arguments(self, index: int, **other: Any) -> dict[str, Any]:
        """Arguments of the operator for map `index`."""
        later, own = self.later(index), self.blocks[index]
        sums = [self.blocks[k]["da"][index] for k in later]
        sums += [own["da"][index], own["db"]] if self.reached[index] else []
        empty = own["db"].new_empty(0)
        return {
            "table": self.table,
            "index": index,
            "sums": torch.stack(sums).double() if sums else torch.empty(0, self.channels, dtype=torch.float64),
            "a": self.a[index] if self.reached[index] else None,
            "later_a": [self.a[k] for k in later],
            "later_db": [self.blocks[k]["db"].double() for k in later],
            "later_weight": [self.blocks[k]["weight"] for k in later],
            "later_running_mean": [self.blocks[k]["running_mean"] if self.running[k] else empty for k in later],
            "later_running_var": [self.blocks[k]["running_var"] if self.running[k] else empty for k in later],
            "later_dweight": [self.dweight[k] for k in later],
            "count": None,
            "elements": COUNT,
            "norm": int(own["norm"]),
            "eps": EPS,
            "measured": True,
            "pass_on": False,
        } | other

    def check(self, arguments: dict[str, Any], results: Sequence[Tensor]) -> None:
        """Hold results of the operator, and the rows of dweight that it wrote, to what autograd says."""
        rows, k0, dgamma, dbeta, dmoments = (t.cpu() for t in results)
        index, dtype = arguments["index"], self.dtype
        leaf, later = self.leaves[index], self.later(index)
        zeros = torch.zeros(self.channels, dtype=torch.float64)
        grads = {name: zeros if leaf[name].grad is None else leaf[name].grad for name in leaf}
        assert dmoments.dtype == torch.float64
        assert_close(dmoments, torch.stack([grads["mean"], grads["var"]]), torch.float64)
        for k, dweight in zip(later, arguments["later_dweight"], strict=True):
            assert_close(dweight[index].cpu(), self.leaves[k]["weight"].grad[index], dtype)
        for found, name in ((dgamma, "gamma"), (dbeta, "beta")):
            if arguments["norm"] == BranchNorm.NONE:
                assert found.numel() == 0
            else:
                assert found.dtype == dtype
                assert_close(found, grads[name], dtype)
        kept = [self.a[k][index] for k in (*([index] if self.reached[index] else []), *later)]
        assert rows.dtype == dtype and len(rows) == len(kept) + arguments["measured"] + arguments["pass_on"]
        assert all(torch.equal(row, a) for row, a in zip(rows, kept, strict=False))
        k1 = grads["var"] * (2 / COUNT)
        if arguments["measured"]:
            assert_close(rows[len(kept)], k1, dtype)
            assert_close(k0, grads["mean"] / COUNT - rows[len(kept)].double() * leaf["mean"].detach(), dtype)
        else:
            assert k0.numel() == 0
        assert not arguments["pass_on"] or bool((rows[-1] == 1).all())
