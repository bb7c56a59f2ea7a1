"""Batches of 8-bit images in a steady loop: nothing is asked of the system anew, and all that is kept is counted."""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator

import pytest
import torch
from stain_images import synthetic_tissue

import ernet_fast
from ernet_fast import _backend
from ernet_fast.stain import MacenkoNormalizer, macenko_augment, macenko_fit, macenko_normalize

pytestmark = pytest.mark.skipif(not _backend.extension_available(), reason=str(_backend.why_unavailable()))

BATCH, SIZE = 8, 224
NORMALIZER = MacenkoNormalizer(on_degenerate="identity")
CALLS = {
    "fit": macenko_fit,
    "normalise": lambda tiles: macenko_normalize(tiles, NORMALIZER.target),
    "three images": lambda tiles: NORMALIZER.normalize(tiles, stains=True),
    "network's input": lambda tiles: macenko_normalize(tiles, NORMALIZER.target, output=torch.float32),
    "list": lambda tiles: macenko_normalize(list(tiles), NORMALIZER.target),
    "augment": lambda tiles: macenko_augment(tiles, generator=torch.Generator().manual_seed(0)),
}


@pytest.fixture(scope="module")
def tiles() -> torch.Tensor:
    images = torch.stack([torch.from_numpy(synthetic_tissue(SIZE, SIZE, seed)) for seed in range(BATCH)])
    images[3] = 255  # a tile without tissue, which stays as it is
    return images.permute(0, 3, 1, 2)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planar", "channels-last"])
@pytest.mark.parametrize("name", CALLS)
def test_a_steady_loop_asks_for_no_memory(name, layout, threads, tiles):
    """A result in fresh pages would be 294 faults a call; what else the process does may fault now and then."""
    call, batch = CALLS[name], tiles.contiguous(memory_format=layout)
    _backend.extension().poison_map_buffers(False)
    torch.use_deterministic_algorithms(False)  # under which PyTorch fills what it allocates
    gc.collect()
    kept = ernet_fast.output_cache.kept_memory
    for _ in range(5):
        result = call(batch)
    fresh, faults = kept().fresh, page_faults()
    for _ in range(10):
        result = call(batch)
    assert kept().fresh - fresh < threads  # threads that have not overlapped before may do so now
    assert name == "list" or page_faults() - faults < 3 * 294  # PyTorch stacks the images of a list
    del result


def test_what_is_kept_is_bounded_and_can_be_given_back(tiles):
    cache = ernet_fast.output_cache
    limit = cache.kept_memory().limit_bytes
    cache.release_kept_memory()
    result = macenko_normalize(tiles, NORMALIZER.target)
    live = result.numel() + 6 * SIZE * SIZE  # the result, and the logarithms of an image
    del result
    assert tiles.numel() <= cache.kept_memory().kept_bytes <= 1.25 * (live + 2 * 4096) * max(1, torch.get_num_threads())
    cache.set_kept_memory_limit(tiles.numel() // 2)
    assert cache.kept_memory().kept_bytes <= tiles.numel() // 2
    cache.release_kept_memory()
    assert cache.kept_memory().kept_bytes == 0
    cache.set_kept_memory_limit(limit)
