"""From the uint8 batches of a loader to a network's input in training, on the network's device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ernet_fast.data.augment import IMAGENET_MEAN, IMAGENET_STD
from ernet_fast.data.batch_augment import DRAWS, AugmentRanges, augment_batch
from ernet_fast.stain import macenko_augment

if TYPE_CHECKING:
    from ernet_fast.train.config import TrainConfig


def draws_of(seed: int, epoch: int, positions: Sequence[int], count: int) -> Tensor:
    """Numbers [len(positions), count] float64 from 0 to 1 that depend on seed, epoch and position alone."""
    rows = [np.random.default_rng((seed, epoch, position)).random(count) for position in positions]
    return torch.from_numpy(np.stack(rows))


def ranges_of(config: TrainConfig) -> AugmentRanges:
    """The geometric augmentation of a run's settings."""
    names = ("flips", "quarter_turns", "rotation", "translation", "zoom", "crop")
    return AugmentRanges(**{name: getattr(config, name) for name in names})


class TrainingInput:
    """uint8 [B, 3, S, S] to float32 [B, 3, S, S], augmented as the settings say, scaled by ``(x / 255 - mean) / std``.

    An image's augmentation depends on seed, epoch and position alone: not on its batch, nor on the number of processes.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.seed = config.seed
        self.ranges = ranges_of(config) if config.augment else None
        changed = config.augment and (config.stain_gain or config.stain_shift)
        self.stain = (config.stain_gain, config.stain_shift) if changed else None

    def __call__(self, images: Tensor, epoch: int, positions: Tensor) -> Tensor:
        """The input of a batch, on the device of `images`; `positions` are those of the images in their set."""
        pixels = images
        if self.ranges is not None:
            draws = draws_of(self.seed, epoch, positions.tolist(), DRAWS + 4)
            if self.stain is not None:
                images = stain_changed(images, draws[:, DRAWS:], *self.stain)
            pixels = augment_batch(images, draws[:, :DRAWS], self.ranges)
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        return torch.addcmul(-mean / std, pixels.float(), 1 / (std * 255))


def stain_changed(images: Tensor, draws: Tensor, gain: float, shift: float) -> Tensor:
    """`macenko_augment` of uint8 [B, 3, H, W] by draws [B, 4] from 0 to 1: two gains, two shifts."""
    signed = 2 * draws - 1
    changes = (1 + gain * signed[:, :2], shift * signed[:, 2:])
    with torch.no_grad():
        changed: Tensor = macenko_augment(images, changes=changes, layout="CHW", on_degenerate="identity")
    return changed
