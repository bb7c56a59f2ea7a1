"""The rule that tells haematoxylin from eosin, where both absorb as much red, by every implementation alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ernet_fast import _backend, reference
from ernet_fast.stain import ColourCounts, MacenkoNormalizer, macenko_fit, macenko_normalize, torch_backend
from ernet_fast.stain.result import EQUAL_COMPONENTS

TARGET = MacenkoNormalizer().target


def image_with(constant: dict[int, int], seed: int) -> torch.Tensor:
    """Noise [3, 64, 64] with some channels constant."""
    image = np.random.default_rng(seed).integers(30, 200, (3, 64, 64), dtype=np.uint8)
    for channel, level in constant.items():
        image[channel] = level
    return torch.from_numpy(image)


CONSTANT = [{0: 128}, {0: 0}, {0: 205}, {1: 128}, {1: 0}, {2: 128}, {2: 0}, {0: 77, 1: 30}, {0: 90, 2: 90}, {0: 255}]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("constant", CONSTANT, ids=str)
def test_implementations_agree(constant, seed):
    image = image_with(constant, seed)
    expected = reference.macenko_fit(image, layout="CHW")
    fits = [
        macenko_fit(image, layout="CHW"),
        macenko_fit(image.double(), layout="CHW"),
        ColourCounts().add(image).fit(),
    ]
    fits.append(torch_backend.macenko_fit(image[None], 240.0, 1.0, 0.15, False))
    for stain, maximum, status in fits:
        assert status.tolist() == expected.status.tolist()
        torch.testing.assert_close(stain, expected.stain_matrix, rtol=0, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(maximum, expected.max_concentration, rtol=1e-5, atol=0, equal_nan=True)
    found = macenko_normalize(image, TARGET, layout="CHW").int()
    assert (found - reference.macenko_normalize(image, TARGET, layout="CHW").int()).abs().max() <= 1
    if len(constant) == 1 and expected.status[0] == 0:
        h, e = expected.stain_matrix[0].T
        if abs(h[0] - e[0]) <= EQUAL_COMPONENTS:
            assert h[1] < e[1]
        else:
            assert h[0] > e[0]


@pytest.mark.skipif(not _backend.extension_available(), reason="the compiled operators are not built")
def test_a_tie_depends_neither_on_the_batch_nor_on_the_layout():
    images = torch.stack([image_with({0: 128}, seed) for seed in range(5)])
    whole = macenko_fit(images)
    for i in range(5):
        for form in (images[i : i + 1], images[i : i + 1].to(memory_format=torch.channels_last)):
            assert torch.equal(macenko_fit(form).stain_matrix, whole.stain_matrix[i : i + 1])
