"""A batch is augmented on its device as its images are one by one."""

from __future__ import annotations

import math

import pytest
import torch

from ernet_fast.data.augment import affine_matrix, warp_affine
from ernet_fast.data.batch_augment import DRAWS, AugmentRanges, augment_batch

NOTHING = AugmentRanges(False, False, 0.0, 0.0, (1.0, 1.0), 1.0)


def images(count=6, size=24):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def draws(count=6, seed=1):
    return torch.rand(count, DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_nothing_asked_for_changes_nothing():
    batch = images()
    assert torch.equal(augment_batch(batch, draws(), NOTHING), batch.float())


def test_flips_and_turns_move_pixels_exactly():
    batch, numbers = images(), draws()
    found = augment_batch(batch, numbers, AugmentRanges(True, True, 0.0, 0.0, (1.0, 1.0), 1.0))
    for image, row, changed in zip(batch, numbers, found, strict=True):
        expected = image
        if row[0] < 0.5:
            expected = expected.flip(2)
        if row[1] < 0.5:
            expected = expected.flip(1)
        expected = expected.rot90(int(4 * row[2]), dims=(1, 2))
        assert torch.equal(changed, expected.float())


def test_the_resampling_is_that_of_single_images():
    batch, numbers = images(), draws()
    ranges = AugmentRanges(False, False, 30.0, 0.2, (0.5, 2.0), 1.0)
    found = augment_batch(batch, numbers, ranges)
    for image, row, changed in zip(batch, (2 * numbers - 1).tolist(), found, strict=True):
        zoom = math.exp(math.log(0.5) + (row[6] + 1) / 2 * math.log(4))
        matrix = affine_matrix((24, 24), rotation=30 * row[3], translation=(0.2 * row[4], 0.2 * row[5]), zoom=zoom)
        torch.testing.assert_close(changed, warp_affine(image.float(), matrix), rtol=0, atol=1e-2)


@pytest.mark.parametrize(("right", "down"), [(0.0, 0.0), (1.0, 0.25), (0.5, 1.0)])
def test_a_crop_is_a_window_of_the_image_enlarged(right, down):
    ramp = torch.arange(32.0).expand(1, 3, 32, 32)
    across, along = (
        augment_batch(
            x,
            torch.tensor([[0.0] * 7 + [1.0, right, down]]).double(),
            AugmentRanges(*list(vars(NOTHING).values())[:5], 0.5),
        )
        for x in (ramp, ramp.mT)
    )
    inner = slice(2, 30)
    expected = right * 16 + torch.arange(32.0) / 2 - 0.25
    torch.testing.assert_close(across[0, 0, 5, inner], expected[inner], rtol=0, atol=1e-3)
    expected = down * 16 + torch.arange(32.0) / 2 - 0.25
    torch.testing.assert_close(along[0, 0, inner, 5], expected[inner], rtol=0, atol=1e-3)


def test_an_image_does_not_depend_on_its_batch():
    batch, numbers = images(), draws()
    whole = augment_batch(batch, numbers, AugmentRanges(crop=0.6))
    for k in range(6):
        one = augment_batch(batch[k : k + 1], numbers[k : k + 1], AugmentRanges(crop=0.6))
        torch.testing.assert_close(one[0], whole[k], rtol=0, atol=1e-3)


def test_the_input_is_not_modified():
    batch = images()
    before = batch.clone()
    augment_batch(batch, draws(), AugmentRanges())
    assert torch.equal(batch, before)
