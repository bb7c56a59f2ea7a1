"""How near is the result to torchstain's, on real images?

linear   against torchstain's NumPy backend: every value within one grey level, at least 99.95 % identical
nearest  against its torch backend: every value within one grey level, at least 96 % identical

Each image of BreaKHis_tiny, and 224 x 224 crops of BreaKHis_mini with at least 1000 tissue pixels, both sides fitted to
the target of the torchstain project. A row is the percentage of identical values over the images of one set; `worst`
and `largest_difference` are over all of them.

Run: python3 dev.py bench bench/bench_macenko_parity.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from macenko_images import crops, data_root, files_of, read
from macenko_peers import PEERS
from turns import percentiles

from ernet_fast.stain import macenko_fit, macenko_normalize

LEAST_IDENTICAL = {"linear": 99.95, "nearest": 96.0}
PEER = {"linear": "torchstain numpy", "nearest": "torchstain torch"}
FEWEST_CROPS = 500

root = data_root()
needs_data = pytest.mark.skipif(root is None, reason="no real images: set ERNET_TEST_DATA to their folder")


def images_of(name: str) -> list[np.ndarray]:
    if name == "BreaKHis_mini":
        found = list(crops(root))
        assert len(found) >= FEWEST_CROPS, f"{len(found)} crops"
        return found
    return [read(path) for path in files_of(root, name)]


@needs_data
@pytest.mark.parametrize("percentile", LEAST_IDENTICAL)
@pytest.mark.parametrize("name", ["BreaKHis_tiny", "BreaKHis_mini"])
def test_identical_values(record_row, name, percentile):
    pytest.importorskip("torchstain")
    target = read(root / "torchstain" / "target.png")
    fitted = macenko_fit(target, percentile=percentile)
    theirs, _ = PEERS[PEER[percentile]](target)
    identical, largest = [], 0
    for image in images_of(name):
        # torch tensors come back as int32 [H, W, 3], as arrays do.
        expected = np.asarray(torch.as_tensor(theirs(image)()[0])).astype(int)
        found = macenko_normalize(image, fitted, percentile=percentile).astype(int)
        difference = np.abs(found - expected)
        identical.append(100 * float((difference == 0).mean()))
        largest = max(largest, int(difference.max()))
    least = LEAST_IDENTICAL[percentile]
    record_row(
        "identical values", **percentiles(identical), unit="%", repeats=len(identical), peer=PEER[percentile],
        name=f"{name} {percentile}", title=f"identical values, {name}, {percentile}",
        params={"images": name, "percentile": percentile}, worst=min(identical),
        largest_difference=largest, bar=[f"worst >= {least:g}", "largest_difference <= 1"],
        detail=f"{len(identical)} images against {PEER[percentile]}",
    )  # fmt: skip
    assert largest <= 1 and min(identical) >= least
