"""Images on their way to the network: chosen, prepared, perhaps kept, augmented, in an order that can be repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ernet_fast.data import PatchTransform, Sample, read_image
from ernet_fast.data.augment import resized

Batch = tuple[Tensor, Tensor, Tensor]
"""Images float32 [N, 3, S, S], class indices int64 [N], positions in the sample list int64 [N]."""


def mixed_seed(*parts: int) -> int:
    """One 64-bit seed of several non-negative numbers; different numbers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def evenly_chosen(samples: Sequence[Sample], count: int | None) -> list[Sample]:
    """At most `count` samples, evenly spaced in the order of class, patient, magnification and name; None keeps all.

    Each class, patient and magnification keeps its share (give or take one image), whatever the order of `samples`.
    """
    ordered = sorted(samples, key=lambda s: (s.label, s.patient, s.magnification, s.path.name))
    if count is None or count >= len(ordered):
        return ordered
    return [ordered[(2 * k + 1) * len(ordered) // (2 * count)] for k in range(count)]


class ImageSet(Dataset[Any]):
    """Samples as network input, addressed by ``(epoch, position)``.

    An image's augmentation depends on seed, epoch and position alone: neither on the number of processes nor on what
    was read before, so a resumed run sees what an uninterrupted one would have seen.

    `size` are the pixels of the result's sides; `resize` and `normalizer` are those of `PatchTransform`. With `cache`
    each prepared image (uint8, after normalisation and resize) stays in memory.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        size: int,
        *,
        resize: str = "shorter",
        normalizer: Callable[[Tensor], Tensor] | None = None,
        augment: bool = False,
        cache: bool = False,
        seed: int = 0,
    ) -> None:
        self.samples = list(samples)
        self.size, self.resize, self.normalizer, self.augment, self.seed = size, resize, normalizer, augment, seed
        self._transform = PatchTransform(size, train=augment, resize="none")
        self._kept: list[Tensor | None] | None = [None] * len(self.samples) if cache else None

    def __len__(self) -> int:
        return len(self.samples)

    def prepared(self, position: int) -> Tensor:
        """The image before augmentation: uint8, normalised, resized to cover the size."""
        if self._kept is not None and (kept := self._kept[position]) is not None:
            return kept
        image = read_image(self.samples[position].path)
        if self.normalizer is not None:
            image = self.normalizer(image)
        image = resized(image, (self.size, self.size), self.resize)
        if self._kept is not None:
            self._kept[position] = image
        return image

    def __getitem__(self, address: tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, position = address
        image, label = self.prepared(position), self.samples[position].label
        with torch.random.fork_rng(devices=[], enabled=self.augment):
            if self.augment:
                torch.random.default_generator.manual_seed(mixed_seed(self.seed, epoch, position))
            return self._transform(image), label, position


class EpochSampler(Sampler[tuple[int, int]]):
    """Addresses ``(epoch, position)`` of one process's share of an epoch; set `epoch` before iterating.

    Every process takes every `world_size`-th image; shuffled, of a permutation that seed and epoch decide, and surplus
    images (fewer than `world_size`) sit the epoch out, so that all processes take equally many steps.
    """

    def __init__(self, count: int, *, shuffle: bool, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.count, self.shuffle, self.seed, self.rank, self.world_size = count, shuffle, seed, rank, world_size
        self.epoch = 0

    def __len__(self) -> int:
        if self.shuffle:
            return self.count // self.world_size
        return len(range(self.rank, self.count, self.world_size))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.arange(self.count)
        if self.shuffle:
            order = torch.randperm(
                self.count, generator=torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
            )
        share = order[self.rank :: self.world_size][: len(self)]
        return ((self.epoch, position) for position in share.tolist())


def build_loader(
    images: ImageSet, *, batch_size: int, shuffle: bool, seed: int = 0, num_workers: int = 0, fabric: Any = None
) -> tuple[DataLoader[Batch], EpochSampler]:
    """A loader and its sampler, of the share of `fabric`'s process (default: all images).

    Shuffled, an incomplete last batch is left out, unless it would be the only one; ValueError if there is none.
    """
    rank, world_size = (0, 1) if fabric is None else (fabric.global_rank, fabric.world_size)
    sampler = EpochSampler(len(images), shuffle=shuffle, seed=seed, rank=rank, world_size=world_size)
    loader: DataLoader[Batch] = DataLoader(
        images,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        drop_last=shuffle and len(sampler) >= batch_size,
        pin_memory=fabric is not None and fabric.device.type == "cuda",
        persistent_workers=num_workers > 0,
        # Its own: by default each pass draws from torch's, and validation would move the training's numbers.
        generator=torch.Generator().manual_seed(mixed_seed(seed, len(images))),
    )
    if shuffle and not len(loader):
        raise ValueError(
            f"{len(images)} training images are too few for {world_size} processes; each needs one image at least."
        )
    return loader, sampler
