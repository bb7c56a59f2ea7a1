"""The GPU benches of Macenko normalisation, dry: every case runs on the CPU, on tiny images, and says no speed."""

from __future__ import annotations

import math

import bench_macenko_gpu as bench
import pytest
import torch
from gpu_case import Ceilings
from this_tree import macenko_peers
from tissue import tissue

CEILINGS = Ceilings(100.0, math.nan)


@pytest.fixture
def here(monkeypatch):
    """The CPU in place of a device, which takes a millisecond for everything."""
    monkeypatch.setattr(bench, "SIZES", {"24x16": (16, 24)})

    def milliseconds(call, repeats=1):
        call()
        return {"p20": 0.9, "p50": 1.0, "p80": 1.1}

    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "milliseconds", milliseconds)
    monkeypatch.setattr(bench, "wait", lambda: None)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "operation", ["normalize", "fit", "augment", "normalize, stains given", "normalize to bfloat16 input"]
)
def test_one_operation(here, operation, channels_last):
    row = bench.measure(operation, "24x16", 21, channels_last, CEILINGS)
    written = {"fit": 0, "normalize to bfloat16 input": 2}.get(operation, 1)
    assert row.extra_info["images_per_second"] == 21_000 and row.p50 == 1.0 and row.unit == "ms"
    assert row.extra_info["copy_time"] == pytest.approx(21 * 3 * 16 * 24 * (1 + written) / 100e6, rel=1e-3)
    assert row.name == bench.name_of(operation, "24x16", 21, channels_last)


def test_a_wrong_result_is_not_timed(here, monkeypatch):
    wrong = {"normalize": lambda call: lambda: call() + 2, "batch": lambda call: lambda: call().flip(0)}
    real = bench.call_of
    for change in wrong.values():
        monkeypatch.setattr(
            bench,
            "call_of",
            lambda name, images, change=change: (change if len(images) > 8 else lambda x: x)(real(name, images)),
        )
        with pytest.raises(AssertionError):
            bench.measure("normalize", "24x16", 13, False, CEILINGS)


def test_repeats_must_have_the_same_bits():
    images = torch.arange(7).repeat_interleave(2)
    bench.require_repeats("same", images.reshape(7, 2)[:1].repeat(5, 1), 1)
    bench.require_repeats("same", torch.tensor([1, 2, 3, 1, 2]), 3)
    with pytest.raises(AssertionError, match="image 3 or one of the 1 behind it"):
        bench.require_repeats("other", torch.tensor([1, 2, 3, 1, 3]), 3)


def test_uploads(here):
    for page_locked in (False, True):
        row = bench.upload("24x16", 10, page_locked, CEILINGS, batches=3)
        assert row.extra_info["copy_time"] == 1.0 and row.extra_info["images_per_second"] > 0


def test_peers_that_import_and_reasons_for_the_others(here, monkeypatch):
    monkeypatch.setattr(bench, "SIZES", {"48x40": (40, 48)})
    rows = {row.name: row for row in bench.against_peers("48x40", CEILINGS, count=9)}
    ours = rows.pop("peers 48x40")
    assert set(rows) == {f"peers 48x40 {peer.name}" for peer in macenko_peers.peers_on("cpu")}
    for name in (peer.name for peer in macenko_peers.peers_on("cpu")):
        row, key = rows[f"peers 48x40 {name}"], f"ratio_{name.replace('-', '_').replace(' ', '_').lower()}"
        if name in ours.extra_info["missing"]:
            assert row.status == "skipped" and row.extra_info["detail"] and key not in ours.extra_info
        else:
            assert ours.extra_info[key] == pytest.approx(row.p50 / ours.p50, rel=1e-2)
            assert ours.extra_info["ratio_best_peer"] <= ours.extra_info[key]


def test_torchstain_is_called_on_the_images_given():
    pytest.importorskip("torchstain")
    images = tissue(3, 40, 48)
    (peer,) = (peer for peer in macenko_peers.PEERS if peer.name == "torchstain torch")
    assert [result.shape for result in peer.normalize(images, tissue(1, 64, 64)[0])()] == [(40, 48, 3)] * 3


def test_cases_cover_the_issue_and_fit_in_memory():
    cases = {case.name: case for case in bench.gpu_cases()}
    assert len(cases) == len(bench.gpu_cases())
    for size, (height, width) in bench.SIZES.items():
        counts = list(bench.batches_of(size))
        assert counts[0] == 1 and counts[-1] * height * width <= bench.MOST_PIXELS
        assert all(bench.name_of("normalize", size, count) in cases for count in counts)
    assert cases["normalize 4096 x 224x224"].targets == ["images_per_second >= 1000000"]
    assert cases["normalize 4096 x 700x460"].targets == ["images_per_second >= 160000"]
    assert cases["peers 224x224"].targets == ["ratio_best_peer >= 15", "ratio_torchstain_torch >= 1000"]
    assert all(case.seconds <= 60 for case in cases.values())
