"""Images on their way to the network: chosen, prepared, perhaps kept, augmented, in an order that can be repeated."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ernet_fast.data import ImageReadError, PatchTransform, Sample, read_image
from ernet_fast.data.augment import resized
from ernet_fast.data.packed import PackedImages
from ernet_fast.train.stop_signals import SIGNALS

Batch = Any
"""Images [N, 3, S, S], class indices and positions in the sample list int64 [N]; in training, what was wrong."""


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
    """Samples as network input, or as what `TrainingInput` makes that of, addressed by ``(epoch, position)``.

    Without `training` an item is (float32 [3, S, S], class index, position). With it, it is (uint8 [3, S, S], class
    index, position, what was wrong), augmented on the device later; if an image cannot be read and `on_error` is
    ``"skip"``, another one of its class takes its place, and the last entry says so. It is empty otherwise.

    `size` are the pixels of the result's sides; `resize` and `normalizer` are those of `PatchTransform`. With `cache`
    each prepared image (uint8, after normalisation and resize) stays in memory. `random_crop` chooses the place of
    the crop by seed, epoch and position alone, so a resumed run sees what an uninterrupted one would have seen.
    `packed` holds the images, decoded and perhaps prepared, in place of their files.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        size: int,
        *,
        resize: str = "shorter",
        normalizer: Callable[[Tensor], Tensor] | None = None,
        training: bool = False,
        random_crop: bool = False,
        cache: bool = False,
        seed: int = 0,
        on_error: str = "raise",
        packed: PackedImages | None = None,
    ) -> None:
        self.samples = list(samples)
        self.size, self.resize, self.normalizer, self.seed = size, resize, normalizer, seed
        self.training, self.random_crop, self.on_error, self.packed = training, random_crop, on_error, packed
        self._transform = PatchTransform(size, resize="none")
        self._kept: list[Tensor | None] | None = [None] * len(self.samples) if cache else None
        if isinstance(normalizer, SlideAware) and not (packed and packed.settings["stain"]):
            normalizer.prepare(self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def prepared(self, position: int) -> Tensor:
        """The image before augmentation: uint8, normalised, resized to cover the size."""
        if self._kept is not None and (kept := self._kept[position]) is not None:
            return kept
        sample = self.samples[position]
        image = read_image(sample.path) if self.packed is None else self.packed.read(sample.name)
        if self.packed is None or self.packed.settings["stain"] is None:
            image = normalised(image, sample, self.normalizer)
        image = resized(image, (self.size, self.size), self.resize)
        if self._kept is not None:
            self._kept[position] = image
        return image

    def __getitem__(self, address: tuple[int, int]) -> tuple[Any, ...]:
        epoch, position = address
        if not self.training:
            return self._transform(self.prepared(position)), self.samples[position].label, position
        image, taken, problem = self._readable(position)
        room = image.shape[1] - self.size, image.shape[2] - self.size
        top, left = (r // 2 for r in room)
        if self.random_crop and any(room):
            place = np.random.default_rng((self.seed, epoch, position, 1))
            top, left = (int(place.integers(r + 1)) for r in room)
        crop = image[:, top : top + self.size, left : left + self.size].contiguous()
        return crop, self.samples[taken].label, taken, problem

    def _readable(self, position: int) -> tuple[Tensor, int, str]:
        """The image at `position`, or of the next of its class that can be read; its position; what was wrong."""
        problem = ""
        label, count = self.samples[position].label, len(self.samples)
        for k in range(position, position + count):
            if self.samples[k % count].label == label:
                try:
                    return self.prepared(k % count), k % count, problem
                except (ImageReadError, OSError) as error:
                    if self.on_error != "skip":
                        raise
                    problem = problem or f"{self.samples[position].path}: {error}"
        raise ImageReadError(f"no image of class {label} can be read any more; the first error was {problem}")


class SlideAware:
    """A normaliser that treats an image by what it knows of its slide."""

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Get to know the slides of these samples."""
        raise NotImplementedError

    def of_slide(self, image: Tensor, sample: Sample) -> Tensor:
        """The normalised image of a sample, uint8 [3, H, W]."""
        raise NotImplementedError


def normalised(image: Tensor, sample: Sample, normalizer: Callable[[Tensor], Tensor] | None) -> Tensor:
    """uint8 [3, H, W] with the stains of the target, or as it is without `normalizer`."""
    if isinstance(normalizer, SlideAware):
        return normalizer.of_slide(image, sample)
    return image if normalizer is None else normalizer(image)


class EpochSampler(Sampler[tuple[int, int]]):
    """Addresses ``(epoch, position)`` of one process's share of an epoch; set `epoch` before iterating.

    Every process takes every `world_size`-th image; shuffled, of a permutation that seed and epoch decide, and surplus
    images (fewer than `world_size`) sit the epoch out, so that all processes take equally many steps. `start` is the
    number of addresses to leave out, because an interrupted run has been there.

    With `labels` (the class of each image) every class is drawn equally often in an epoch of as many images: images of
    a rare class several times, in turn, and not all of a frequent one.
    """

    def __init__(
        self,
        count: int,
        *,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        labels: Sequence[int] | None = None,
    ) -> None:
        self.count, self.shuffle, self.seed, self.rank, self.world_size = count, shuffle, seed, rank, world_size
        self.labels = None if labels is None else torch.tensor(labels)
        self.epoch = self.start = 0

    def __len__(self) -> int:
        if self.shuffle:
            return self.count // self.world_size
        return len(range(self.rank, self.count, self.world_size))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.arange(self.count)
        if self.shuffle:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
            order = torch.randperm(self.count, generator=generator)
            if self.labels is not None:
                order = self._balanced(generator)[order]
        share = order[self.rank :: self.world_size][: len(self)]
        return ((self.epoch, position) for position in share[self.start :].tolist())

    def _balanced(self, generator: torch.Generator) -> Tensor:
        """Positions [count], class by class: each class's images at random, again and again until it has its share."""
        assert self.labels is not None
        classes = self.labels.unique()
        parts = []
        for k, label in enumerate(classes):
            images = (self.labels == label).nonzero()[:, 0]
            share = self.count // len(classes) + (k < self.count % len(classes))
            rounds = -(-share // len(images))
            turns = [images[torch.randperm(len(images), generator=generator)] for _ in range(rounds)]
            parts.append(torch.cat(turns)[:share])
        return torch.cat(parts)


def _leave_signals_to_the_run(worker: int) -> None:
    """A scheduler signals all processes of a job; a worker that ended would end the run before its checkpoint."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def build_loader(
    images: ImageSet,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int = 0,
    num_workers: int = 0,
    fabric: Any = None,
    balanced: bool = False,
) -> tuple[DataLoader[Batch], EpochSampler]:
    """A loader and its sampler, of the share of `fabric`'s process (default: all images); `balanced`: see the sampler.

    Shuffled, an incomplete last batch is left out, unless it would be the only one; ValueError if there is none.
    """
    rank, world_size = (0, 1) if fabric is None else (fabric.global_rank, fabric.world_size)
    labels = [sample.label for sample in images.samples] if balanced else None
    sampler = EpochSampler(len(images), shuffle=shuffle, seed=seed, rank=rank, world_size=world_size, labels=labels)
    loader: DataLoader[Batch] = DataLoader(
        images,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        drop_last=shuffle and len(sampler) >= batch_size,
        pin_memory=fabric is not None and fabric.device.type == "cuda",
        persistent_workers=num_workers > 0,
        worker_init_fn=_leave_signals_to_the_run,
        # Its own: by default each pass draws from torch's, and validation would move the training's numbers.
        generator=torch.Generator().manual_seed(mixed_seed(seed, len(images))),
    )
    if shuffle and not len(loader):
        raise ValueError(
            f"{len(images)} training images are too few for {world_size} processes; each needs one image at least."
        )
    return loader, sampler
