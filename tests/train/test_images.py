"""Order and augmentation can be repeated, whatever reads the images."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from ernet_fast.data import BreakHis
from ernet_fast.stain import MacenkoNormalizer
from ernet_fast.train import TrainConfig
from ernet_fast.train.images import EpochSampler, ImageSet, build_loader, evenly_chosen
from ernet_fast.train.training_input import TrainingInput


@pytest.fixture
def samples(tiny_breakhis):
    return BreakHis(tiny_breakhis, "train").samples


def epoch_images(samples, epoch, **changes):
    normalizer = MacenkoNormalizer(layout="CHW")  # its operator must also work in processes that were forked
    settings = {"size": 32, "training": True, "random_crop": True, "seed": 4, "normalizer": normalizer} | changes
    workers = settings.pop("num_workers", 0)
    loader, order = build_loader(ImageSet(samples, **settings), batch_size=4, shuffle=True, seed=4, num_workers=workers)
    order.epoch = epoch
    change = TrainingInput(TrainConfig(data="d", out="o", seed=4, stain_gain=0.2, stain_shift=0.1, crop=0.7))
    batches = list(loader)
    where = [batch[2] for batch in batches]
    return torch.cat([change(batch[0], epoch, batch[2]) for batch in batches]), torch.cat(where)


def test_an_epoch_is_the_same_with_workers_cache_and_another_history(samples):
    expected = epoch_images(samples, 3)
    torch.manual_seed(999)
    for changes in ({}, {"cache": True}, {"num_workers": 2}):
        for found, wanted in zip(epoch_images(samples, 3, **changes), expected, strict=True):
            assert torch.equal(found, wanted), changes


def test_epochs_and_seeds_differ(samples):
    first, order = epoch_images(samples, 1)
    second, other = epoch_images(samples, 2)
    assert not torch.equal(order, other) and not torch.equal(first, second)
    image = ImageSet(samples, 32, training=True)[1, 0][0][None]
    changes = [TrainingInput(TrainConfig(data="d", out="o", seed=seed)) for seed in (4, 5)]
    place = torch.tensor([0])
    assert not torch.equal(changes[0](image, 1, place), changes[0](image, 2, place))
    assert not torch.equal(changes[0](image, 1, place), changes[1](image, 1, place))


def test_augmentation_leaves_torchs_generator_alone(samples):
    before = torch.get_rng_state()
    epoch_images(samples, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cached_image_is_prepared_once_and_not_changed(samples):
    calls = []

    def normalizer(image):
        calls.append(1)
        return image

    images = ImageSet(samples, 32, normalizer=normalizer, training=True, cache=True)
    first = images.prepared(0).clone()
    for epoch in range(3):
        images[epoch, 0]
    assert len(calls) == 1 and torch.equal(images.prepared(0), first)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_an_epoch(shuffle, world_size):
    count = 14
    shares = [
        list(EpochSampler(count, shuffle=shuffle, seed=1, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    times = Counter(position for share in shares for _, position in share)
    assert max(times.values()) == 1
    if shuffle:  # equally many steps; fewer than world_size images sit out
        assert len({len(share) for share in shares}) == 1 and len(times) > count - world_size
    else:
        assert len(times) == count


def test_evenly_chosen_keeps_shares_and_ignores_order(samples):
    chosen = evenly_chosen(samples, len(samples) // 2)
    assert len(chosen) == len(samples) // 2 and chosen == evenly_chosen(samples[::-1], len(samples) // 2)
    for part in ("label", "magnification"):
        whole = Counter(getattr(s, part) for s in samples)
        half = Counter(getattr(s, part) for s in chosen)
        assert all(abs(2 * half[key] - whole[key]) <= 2 for key in whole), part
    assert {s.patient for s in chosen} == {s.patient for s in samples}
    assert len(evenly_chosen(samples, None)) == len(evenly_chosen(samples, 10**6)) == len(samples)
    assert len(set(evenly_chosen(samples, len(samples) - 1))) == len(samples) - 1
