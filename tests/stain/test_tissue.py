"""Tissue by optical density, counted three neighbours at a time."""

from __future__ import annotations

import numpy as np
import pytest

from ernet_fast.stain import tissue
from ernet_fast.stain.tissue import Tissue


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (64, 256), (129, 300)])
def test_counts_are_those_of_the_definition(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    density = -np.log((image.astype(float) + 1) / 240)
    right = (density >= 0.15).all(axis=2)
    found = Tissue(240, 0.15)
    assert np.array_equal(found.mask(image), right) and found.count(image) == right.sum()
    assert found.share(image) == right.mean()
    assert found.count(image[:, ::-1]) == right.sum(), "views too"
    assert image.size > tissue._BLOCK or shape != (129, 300), "one image is more than a block"


def test_none_is_tissue():
    assert Tissue(Io=1, beta=5).level == -1
    assert Tissue(Io=1, beta=5).count(np.zeros((4, 4, 3), np.uint8)) == 0
    assert Tissue().share(np.zeros((0, 4, 3), np.uint8)) == 0
