"""The images that a network is most wrong about, and where it looked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ernet_fast.data import Sample
from ernet_fast.data.augment import IMAGENET_MEAN, IMAGENET_STD
from ernet_fast.train.grad_cam import grad_cam
from ernet_fast.train.images import ImageSet
from ernet_fast.train.predictions import Predictions

_BATCH = 8


@dataclass(frozen=True)
class Mistake:
    """An image of the wrong class: the network's input as uint8 [3, H, W], the class that it was called, the
    probabilities [K], and the Grad-CAM map [H, W] of that class, 0 to 1.
    """

    sample: Sample
    predicted: int
    probabilities: tuple[float, ...]
    image: Tensor
    heat: Tensor

    def facts(self, classes: Sequence[str]) -> dict[str, Any]:
        """What can be said of it in words."""
        sample = self.sample
        return {
            "image": sample.path.name,
            "patient": sample.patient,
            "magnification": sample.magnification,
            "true": classes[sample.label],
            "predicted": classes[self.predicted],
            "p_true": self.probabilities[sample.label],
            "p_predicted": self.probabilities[self.predicted],
        }


def worst_mistakes(predictions: Predictions, count: int) -> list[int]:
    """Positions of at most `count` images that are classified wrongly, least probable true class first."""
    rows = torch.arange(len(predictions))
    true = predictions.probabilities[rows, predictions.targets]
    wrong = rows[predictions.predicted != predictions.targets]
    return wrong[true[wrong].argsort(stable=True)][:count].tolist()


def find_mistakes(
    network: nn.Module, forward: Callable[[Tensor], Tensor], images: ImageSet, predictions: Predictions, count: int
) -> tuple[Mistake, ...]:
    """The `count` worst of `predictions`, of `images` in the same order; `forward` as in `predictions.predict`."""
    found = []
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    chosen = worst_mistakes(predictions, count)
    for start in range(0, len(chosen), _BATCH):
        part = chosen[start : start + _BATCH]
        inputs = torch.stack([images[0, position][0] for position in part])
        guesses = predictions.predicted[part]
        heats = grad_cam(network, inputs, guesses, forward=forward)
        shown = (inputs * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)
        for row, position in enumerate(part):
            probabilities = tuple(predictions.probabilities[position].tolist())
            sample, guess = predictions.samples[position], int(guesses[row])
            found.append(Mistake(sample, guess, probabilities, shown[row], heats[row]))
    return tuple(found)
