"""Memory of freed outputs, kept for the next ones: bounds, switches, threads, forks, and results that stay right."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from er_cases import DTYPES, LAYOUTS, maps_like, relative_error, tolerance

from ernet_fast import _backend, er_resnet50, optimize_for_inference
from ernet_fast.er import operators
from ernet_fast.output_cache import kept_memory, release_kept_memory, set_kept_memory_limit

pytestmark = pytest.mark.skipif(not _backend.extension_available(), reason=str(_backend.why_unavailable()))

SIZE = 4 * 64 * 56 * 20 * 4  # bytes of LARGE in float32, more than the least that is kept
LARGE = (4, 64, 56, 20)
LARGER = (8, 64, 56, 20)
DEFAULT_LIMIT = 2 << 30


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    """A limit whose 32nd is half of SIZE."""
    gc.collect()
    limit = kept_memory().limit_bytes
    set_kept_memory_limit(0)
    set_kept_memory_limit(16 * SIZE)
    yield
    set_kept_memory_limit(limit)
    release_kept_memory()


def double(x: torch.Tensor) -> torch.Tensor:
    return operators.weighted_sum([x], torch.full((1, x.shape[1]), 2.0))


def test_memory_is_used_again():
    x = torch.randn(LARGE)
    before = kept_memory()
    first = double(x)
    address = first.data_ptr()
    assert kept_memory().kept_bytes == 0
    del first
    assert kept_memory().kept_bytes == SIZE
    second = double(x)
    assert second.data_ptr() == address and kept_memory().kept_bytes == 0
    after = kept_memory()
    assert (after.reused - before.reused, after.fresh - before.fresh) == (1, 1)
    assert torch.equal(second, 2 * x)


def test_memory_serves_sizes_up_to_a_quarter_smaller():
    """As where images of several sizes alternate: the smallest buffer that fits, and a larger one never."""
    large = torch.randn(LARGE)
    results = [double(large) for _ in range(2)]
    addresses = {result.data_ptr() for result in results}
    results.clear()
    fits, too_small = (torch.randn(*LARGE[:3], width) for width in (16, 15))
    results.append(double(fits))
    assert results[0].data_ptr() in addresses and torch.equal(results[0], 2 * fits)
    results.clear()
    assert kept_memory().kept_bytes == 2 * SIZE  # as large as they were
    before = kept_memory().fresh
    for width in [20, 17, 18, 16, 19] * 4:
        double(torch.randn(*LARGE[:3], width))
    assert kept_memory().fresh == before
    double(too_small)
    assert kept_memory().fresh == before + 1


def test_kept_and_live_exceed_what_was_live_by_a_quarter_at_most():
    small, large = torch.randn(LARGE), torch.randn(LARGER)
    results = [double(small) for _ in range(4)]  # the peak: 4 sizes, so 5 are the most from here on
    del results
    assert kept_memory().kept_bytes == 4 * SIZE
    result = double(large)  # 2 sizes beside the 4: one is given back
    assert kept_memory().kept_bytes == 3 * SIZE
    other = double(large)  # 2 more: 3 in all are given back
    assert kept_memory().kept_bytes == SIZE
    del result, other
    assert kept_memory().kept_bytes == 5 * SIZE


def test_sizes_that_take_turns_within_the_quarter_are_all_kept():
    small, large = torch.randn(LARGE), torch.randn(LARGER)
    for _ in range(3):
        forward = [double(small) for _ in range(8)]
        before = kept_memory().fresh
        while len(forward) > 1:
            forward.pop()
            backward = double(large) if len(forward) == 6 else None
            del backward
    assert kept_memory().fresh == before and kept_memory().kept_bytes == 10 * SIZE


def test_a_little_more_is_kept_whatever_was_live():
    """A 32nd of the limit: as in inference, where the maps of one stage alone are live."""
    set_kept_memory_limit(64 * SIZE)
    small, large, huge = (torch.randn(samples, *LARGE[1:]) for samples in (4, 8, 16))
    double(large)
    double(small)
    assert kept_memory().kept_bytes == 3 * SIZE  # 2 were live at once, 2 more may be kept
    double(huge)  # 4 sizes beside the 3: 6 are the most now, and the oldest 2 are given back
    assert kept_memory().kept_bytes == 5 * SIZE


@pytest.mark.parametrize("batch", [1, 3])
def test_inference_asks_for_no_memory_anew(batch):
    set_kept_memory_limit(DEFAULT_LIMIT)
    model = optimize_for_inference(er_resnet50(4).to(memory_format=torch.channels_last).eval())
    images = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    fresh = []
    with torch.inference_mode():
        for _ in range(3):
            model(images)
            fresh.append(kept_memory().fresh)
    assert fresh[1:] == [fresh[0]] * 2 and kept_memory().kept_bytes > 0


def test_a_training_step_asks_for_no_memory_anew():
    """Forward and backward of a network want different sizes at different times."""
    set_kept_memory_limit(DEFAULT_LIMIT)
    model = er_resnet50(4, base_channels=32).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 128, 128).contiguous(memory_format=torch.channels_last)
    before, fresh = kept_memory().fresh, []
    for _ in range(4):
        model(images).square().sum().backward()
        model.zero_grad()
        fresh.append(kept_memory().fresh - before)
    # Autograd's thread frees maps while others are asked for: a few more may be wanted at once than ever before.
    assert fresh[3] - fresh[0] <= fresh[0] // 10 and kept_memory().kept_bytes > 0


def test_release_forgets_what_was_live():
    small, large = torch.randn(LARGE), torch.randn(LARGER)
    results = [double(small) for _ in range(8)]
    del results
    release_kept_memory()
    assert kept_memory().kept_bytes == 0
    double(small)
    double(large)  # 2 sizes are the most that was live now, so the first one is given back
    assert kept_memory().kept_bytes == 2 * SIZE


def test_limit():
    x = torch.randn(LARGE)
    set_kept_memory_limit(2 * SIZE)
    results = [double(x) for _ in range(4)]
    del results
    assert kept_memory().kept_bytes == 2 * SIZE
    set_kept_memory_limit(SIZE)
    assert kept_memory().kept_bytes == SIZE
    result = double(torch.randn(LARGER))  # larger than the limit: not kept
    del result
    assert kept_memory().kept_bytes == 0
    with pytest.raises(ValueError, match="limit_bytes is -1; expected"):
        set_kept_memory_limit(-1)


def test_zero_switches_it_off():
    x = torch.randn(LARGE)
    live = double(x)
    set_kept_memory_limit(0)
    before = kept_memory()
    assert torch.equal(double(x), live)
    del live  # taken before, freed after
    assert kept_memory() == before and before.kept_bytes == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_results(dtype, layout):
    """Every element of large results is written; the memory holds NaN before, and is that of an earlier result."""
    dy, y, *maps = maps_like((2, 65, 71, 37), 5, dtype, layout)
    a = torch.randn(3, 65, dtype=operators.acc_dtype(dy), generator=torch.Generator().manual_seed(3))
    expected = sum(a[i].double()[None, :, None, None] * x.double() for i, x in enumerate(maps))
    scale = sum(a[i].double()[None, :, None, None].abs() * x.double().abs() for i, x in enumerate(maps))
    for _ in range(2):
        result = operators.weighted_sum(maps, a)
        assert float((result.double() - expected).norm() / scale.norm()) <= tolerance(dtype, 3)
        assert result.stride() == dy.stride()
        g = operators.weighted_dot(dy, maps, y)[2]
        assert torch.equal(g, dy.masked_fill(y <= 0, 0)) and g.stride() == dy.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_written_past_the_cache(dtype, layout):
    """Large outputs take other stores; rows of 49 and 65 elements are not aligned."""
    for shape in ((2, 65, 260, 260), (90, 2048, 7, 7)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).contiguous(memory_format=layout)
        y = operators.weighted_sum([x, x], torch.tensor([[1.0], [0.5]]).expand(2, shape[1]).contiguous(), None, True)
        assert relative_error(y, (1.5 * x.double()).relu()) <= tolerance(dtype, 2)
        assert torch.equal(operators.weighted_dot(x, [x], y)[2], x.relu())


def test_tensors_behave_like_others():
    x = torch.randn(LARGE)
    y = double(x)
    view, array, kept = y[1:, 3], y.numpy(), y.clone()
    assert torch.equal(copy.deepcopy(y), kept) and torch.equal(pickle.loads(pickle.dumps(y)), kept)
    del y
    others = [double(-x) for _ in range(3)]
    assert torch.equal(view, kept[1:, 3]) and torch.equal(torch.from_numpy(array), kept)
    assert all(torch.equal(other, -kept) for other in others)
    shared = double(x).share_memory_()
    assert shared.is_shared() and torch.equal(shared, kept)
    double(x).requires_grad_().sum().backward()


def test_many_threads():
    """Results of several threads, freed by yet another one, never share memory."""
    wrong, results = [], []

    def work(seed: int) -> None:
        x = torch.randn(LARGE, generator=torch.Generator().manual_seed(seed))
        for _ in range(20):
            y = double(x)
            if not torch.equal(y, x + x):
                wrong.append(seed)
            results.append(y)
            if len(results) > 4:
                results.pop(0)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    del results[:]
    assert kept_memory().kept_bytes <= kept_memory().limit_bytes


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


FORK = """
import os, torch
from ernet_fast.er import operators
torch.set_num_threads(1)
x = torch.randn(4, 64, 56, 20)
two = torch.full((1, 64), 2.0)
y = operators.weighted_sum([x], two)
freed = operators.weighted_sum([x], two); del freed
child = os.fork()
mine = operators.weighted_sum([-x if child else x], two)
right = torch.equal(y, 2 * x) and torch.equal(mine, (-2 if child else 2) * x)
del y, mine
again = operators.weighted_sum([x], two)
right = right and torch.equal(again, 2 * x)
if child == 0:
    os._exit(0 if right else 1)
assert right and os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork():
    done = run(FORK)
    assert done.returncode == 0, done.stderr


def test_environment_variable():
    show = "from ernet_fast.output_cache import kept_memory; print(kept_memory().limit_bytes)"
    assert run(show, ERNET_KEEP_MB="3").stdout.strip() == str(3 << 20)
    assert run(show, ERNET_KEEP_MB="0").stdout.strip() == "0"
    for text in ("much", "-1"):
        bad = run("import ernet_fast", ERNET_KEEP_MB=text)
        assert f"ValueError: environment variable ERNET_KEEP_MB={text}; expected a whole number of MiB" in bad.stderr
