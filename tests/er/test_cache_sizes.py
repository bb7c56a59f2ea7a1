"""The sizes of the CPU's caches: where they come from, and that results do not depend on them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ernet_fast import ERStage, _backend, er_shortcut_sum

pytestmark = pytest.mark.skipif(not _backend.extension_available(), reason=str(_backend.why_unavailable()))
KIB = 1 << 10


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, **variables, "PYTHONPATH": paths}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def digest() -> str:
    """Of forward and backward passes whose maps are larger and smaller than any cache that a test gives."""
    torch.manual_seed(0)
    seen = hashlib.sha256()
    for layout in (torch.contiguous_format, torch.channels_last):
        for shape in ((2, 96, 40, 41), (4, 70, 7, 7)):
            xs = [torch.randn(shape).contiguous(memory_format=layout).requires_grad_() for _ in range(3)]
            weight = torch.randn(2, shape[1], requires_grad=True)
            results = [er_shortcut_sum(xs, weight, relu=True)]
            results[0].backward(torch.randn_like(results[0]))
            stage = ERStage(shape[1], 16, 3, block="basic").to(memory_format=layout).train()
            results.append(stage(xs[0].detach()))
            results[1].square().sum().backward()
            results += [t.grad for t in (*xs, weight, *stage.parameters())]
            for result in results:
                seen.update(result.detach().contiguous().numpy().tobytes())
    return seen.hexdigest()


@pytest.mark.parametrize(
    ("caches", "sizes", "streaming", "bytes_of_maps"),
    [
        ("16K,64K,64K", [16 * KIB, 64 * KIB, 64 * KIB, 48 * KIB, 32 * KIB], "64,1", [64, 1]),
        ("49152,16M,1G", [48 * KIB, 1 << 24, 1 << 30, 12 << 20, 8 << 20], "64K,1G", [64 * KIB, 1 << 30]),
    ],
)
def test_results_do_not_depend_on_the_machine(caches, sizes, streaming, bytes_of_maps):
    code = """import test_cache_sizes as t
print(*t._backend.streaming().values(), *t._backend.caches().values(), t.digest())"""
    ahead, stores, source, seconds, *found, digest_there = run(
        code, ERNET_CACHES=caches, ERNET_STREAMING=streaming
    ).stdout.split()
    assert [int(ahead), int(stores)] == bytes_of_maps and source == "ERNET_STREAMING" and float(seconds) == 0
    assert found.pop(3) == "ERNET_CACHES" and [int(size) for size in found] == sizes
    assert digest_there == digest()


def test_probe():
    """One of its candidates, the same whenever asked, found while one is hardly aware of it."""
    found = _backend.streaming()
    assert found["source"] in ("a probe", "ERNET_STREAMING") and found == _backend.streaming()
    if found["source"] == "a probe":
        assert found["fetch_ahead"] in (512, 1024, 2048, 4096)
        assert found["stores"] in (_backend.caches()["second"], 2**63 - 1)
        assert 0 < found["seconds"] < 2


def test_sizes_of_this_machine():
    """Something sensible, whoever says so."""
    found = _backend.caches()
    assert 4 * KIB <= found["first"] <= found["second"] and found["last"] >= 64 * KIB
    assert found["channel_tile"] >= 3 * found["second"] // 4 and found["gradient"] == found["second"] // 2


def test_other_text_is_refused():
    error = run("import ernet_fast", ERNET_CACHES="32K,512K,0").stderr.splitlines()[-1]
    assert error.startswith("ValueError: environment variable ERNET_CACHES=32K,512K,0; expected the sizes of the first")
    error = run("import ernet_fast", ERNET_STREAMING="2K").stderr.splitlines()[-1]
    assert error.startswith("ValueError: environment variable ERNET_STREAMING=2K; expected how many bytes ahead")
