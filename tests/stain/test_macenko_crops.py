"""Crops of real images against both backends of torchstain. bench/bench_macenko_parity.py does it for all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stain_images import data_root, load

from ernet_fast.stain import macenko_fit, macenko_normalize

COUNT = 16
FEWEST_TISSUE_PIXELS = 1000


@pytest.fixture(scope="module")
def crops():
    """224 x 224 crops, spread over the slides of BreaKHis_mini, with at least 1000 tissue pixels."""
    root = data_root()
    paths = sorted((root / "BreaKHis_mini").rglob("*.jpg")) if root else []
    if not paths:
        pytest.skip("no real images: set ERNET_TEST_DATA to a folder with BreaKHis_mini/ and torchstain/")
    images = [load(path)[:224, :224].copy() for path in paths[:: len(paths) // COUNT]]
    found = [image for image in images if (image.max(axis=2) <= 205).sum() >= FEWEST_TISSUE_PIXELS]
    assert len(found) >= COUNT - 2
    return load(root / "torchstain" / "target.png"), found


def assert_agree(found, expected, least_identical):
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= 1 and (difference == 0).mean() >= least_identical


def test_linear_as_the_numpy_backend(crops):
    target, images = crops
    theirs = pytest.importorskip("torchstain.numpy.normalizers.macenko").NumpyMacenkoNormalizer()
    theirs.fit(target)
    fitted = macenko_fit(target)
    for image in images:
        assert_agree(macenko_normalize(image, fitted), theirs.normalize(image, stains=False)[0], 0.9995)


def test_nearest_as_the_torch_backend(crops):
    target, images = crops
    theirs = pytest.importorskip("torchstain.torch.normalizers.macenko").TorchMacenkoNormalizer()
    theirs.fit(torch.from_numpy(target).permute(2, 0, 1))
    fitted = macenko_fit(target, percentile="nearest")
    for image in images:
        expected = theirs.normalize(torch.from_numpy(image).permute(2, 0, 1), stains=False)[0].numpy()
        assert_agree(macenko_normalize(image, fitted, percentile="nearest"), expected, 0.96)
