"""The counters of bytes, kernels and memory, on operators whose counts are known."""

from __future__ import annotations

import pytest
import torch
from er_branch import branch, give
from er_kernel_counts import Kernels, profiled_kernels
from er_stage_epilogues import LAYOUTS, EpilogueStage, StageShape, make_maps, map_accesses, train_epilogues
from operator_times import operator_milliseconds
from tensor_memory import held_bytes, memory_use
from torch import nn
from traffic import Traffic, bytes_moved

SIZE = 4 * 3 * 8 * 8
BYTES = 4 * SIZE


def moved(call) -> tuple[int, int]:
    with Traffic() as traffic:
        call()
    return traffic.read, traffic.written


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda x, c: x + x, (BYTES, BYTES)),  # the same memory twice is read once
        (lambda x, c: x * c, (BYTES + 12, BYTES)),
        (lambda x, c: x.mul_(2), (BYTES, BYTES)),
        (lambda x, c: x.zero_(), (0, BYTES)),
        (lambda x, c: x.copy_(x + 1), (2 * BYTES, 2 * BYTES)),
        (lambda x, c: x.view(4, -1).transpose(0, 1)[1:].detach(), (0, 0)),
        (lambda x, c: torch.empty_like(x), (0, 0)),
        (lambda x, c: torch.zeros_like(x), (0, BYTES)),
        (lambda x, c: x.sum((0, 2, 3)), (BYTES, 12)),
        (lambda x, c: c.expand(4, 3, 8, 8).clone(), (12, BYTES)),
        (lambda x, c: torch.cat([x, x[:2]]), (BYTES + BYTES // 2, BYTES + BYTES // 2)),
    ],
)
def test_bytes_of_single_operators(call, expected):
    x, c = torch.ones(4, 3, 8, 8), torch.ones(3, 1, 1)
    assert moved(lambda: call(x, c)) == expected


def test_bytes_of_a_backward_pass():
    x = torch.ones(4, 3, 8, 8, requires_grad=True)
    y = torch.relu(x)
    dy = torch.ones_like(y)
    assert moved(lambda: y.backward(dy)) == (2 * BYTES, BYTES)  # threshold_backward alone


def test_kernels_of_single_operators(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # filling is a kernel too
    x, c = torch.ones(4, 3, 8, 8), torch.ones(3)
    bn = nn.BatchNorm2d(3, affine=False)
    assert profiled_kernels(lambda: torch.relu(x * 2).view(4, -1), SIZE) == Kernels(2, 0)
    assert profiled_kernels(lambda: c * c + 1, SIZE) == Kernels(0, 2)
    assert profiled_kernels(lambda: bn(x), SIZE).map == 1
    assert profiled_kernels(lambda: torch.empty_like(x), SIZE) == Kernels(0, 0)
    assert profiled_kernels(lambda: torch.ops.ernet.weighted_sum([x, x], torch.ones(2, 3), c, True), SIZE).map == 1


@pytest.mark.parametrize("size", [7, 56])
def test_kernels_of_tails_do_not_depend_on_the_size_of_maps(monkeypatch, size):
    """Maps of 7 x 7 come from PyTorch's allocator, those of 56 x 56 from memory that the operators keep."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    num_maps = 3
    tails, maps = EpilogueStage(32, num_maps), make_maps(StageShape(32, size, num_maps), 4)
    found = profiled_kernels(lambda: train_epilogues(tails, maps), maps.zs[0].numel())
    assert found == Kernels(num_maps + (num_maps - 1), found.vector)  # backward of each map, forward of each block


def test_time_is_that_of_our_operators():
    tails, maps = EpilogueStage(32, 3), make_maps(StageShape(32, 7, 3), 4)
    found = operator_milliseconds(lambda: train_epilogues(tails, maps), repeats=2)
    assert set(found) == {"call", "er_block", "er_block_backward"}
    assert 0 < sum(found.values()) - found["call"] < found["call"]


def test_memory_of_a_call(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # allocates the filler
    x = torch.ones(4, 3, 8, 8)
    assert memory_use(lambda: x.neg().abs().sqrt()) == (2 * BYTES, BYTES)
    assert held_bytes([x, x.view(-1), x[1:], torch.ones(3)]) == BYTES + 12


def test_map_accesses_are_those_of_the_design():
    """Strip by strip every argument is read once; over whole maps, those that are needed twice are read twice."""
    maps = make_maps(StageShape(8, 56, 4), 2, LAYOUTS["contiguous"])
    read_once = (
        bytes_moved(lambda: train_epilogues(EpilogueStage(8, 4), maps), ("ernet_bench", "aten")) / maps.map_bytes
    )
    assert map_accesses(4, tiled=True) == pytest.approx(read_once, rel=0.1)  # but for bits and vectors
    assert [map_accesses(count, tiled=True) for count in (3, 4, 6, 23)] == [21, 33, 63, 641]
    assert [map_accesses(count, tiled=False) for count in (3, 4, 6, 23)] == [30, 46, 84, 730]


def test_the_stand_in_returns_what_it_was_given_and_its_gradient():
    y = torch.zeros(2, 3, requires_grad=True)
    z, dy = torch.randn(2, 3), torch.randn(2, 3)
    give(7, z, dy)
    found = branch(y, 7)
    assert found.data_ptr() == z.data_ptr() and found.requires_grad
    found.sum().backward()
    assert torch.equal(y.grad, dy)


def test_fused_and_naive_epilogues_agree():
    maps = make_maps(StageShape(5, 6, 4), 3)
    fused = EpilogueStage(5, 4)
    naive = fused.naive()
    found = []
    for stage in (fused, naive):
        train_epilogues(stage, maps)
        gradients = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
        found.append(gradients | {"x_0": maps.zs[0].grad})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 1 + 3 * 3, "x_0, weight, gamma and beta of 3 blocks"
    for name, expected in found[1].items():
        own = found[0][name]
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4 * float(expected.norm()))
