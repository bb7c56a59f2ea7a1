"""What a network said about each image."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ernet_fast.console.atomic_file import write_csv
from ernet_fast.data import Sample
from ernet_fast.train.device import world_size


@dataclass(frozen=True)
class Predictions:
    """Class probabilities [n, K] float64 of n images, their samples in the same order, and the class names."""

    probabilities: Tensor
    samples: tuple[Sample, ...]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        expected = (len(self.samples), len(self.classes))
        if tuple(self.probabilities.shape) != expected:
            raise ValueError(
                f"probabilities have shape {tuple(self.probabilities.shape)}; expected {expected} (images, classes)."
            )

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def targets(self) -> Tensor:
        """True class indices [n] int64."""
        return torch.tensor([sample.label for sample in self.samples], dtype=torch.int64)

    @property
    def predicted(self) -> Tensor:
        """Most probable class [n] int64."""
        return self.probabilities.argmax(dim=1)

    def subset(self, keep: Callable[[Sample], bool]) -> Predictions:
        """The images for which `keep(sample)` is true."""
        rows = [i for i, sample in enumerate(self.samples) if keep(sample)]
        return Predictions(self.probabilities[rows], tuple(self.samples[i] for i in rows), self.classes)

    def by_magnification(self) -> dict[str, Predictions]:
        """The images of each magnification there is, by ``"40X"`` and so on; not of those whose none is known."""
        found = sorted({sample.magnification for sample in self.samples} - {0})
        return {f"{m}X": self.subset(lambda sample, m=m: sample.magnification == m) for m in found}  # type: ignore[misc]

    def loss(self) -> float | None:
        """Cross-entropy, without weights or smoothing: the mean of -ln p(true class); None without images."""
        if not len(self):
            return None
        true = self.probabilities[torch.arange(len(self)), self.targets]
        return float(-true.clamp_min(1e-12).log().mean())

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """One line an image: name, patient, magnification, true and predicted class, probability of each class."""
        rows: list[list[Any]] = [["image", "patient", "magnification", "true", "predicted"]]
        rows[0] += [f"p_{name}" for name in self.classes]
        for sample, guess, row in zip(self.samples, self.predicted.tolist(), self.probabilities.tolist(), strict=True):
            names = self.classes[sample.label], self.classes[guess]
            rows.append([sample.path.name, sample.patient, sample.magnification, *names, *(f"{p:.6f}" for p in row)])
        write_csv(path, rows)


@torch.no_grad()
def predict(
    network: nn.Module,
    forward: Callable[[Tensor], Tensor],
    batches: Iterable[Any],
    samples: Sequence[Sample],
    classes: Sequence[str],
    *,
    advance: Callable[[int], None] = lambda count: None,
) -> Predictions:
    """Run `network`, in evaluation mode, over this process's batches and gather the results of all processes.

    `forward` leads from the images of a batch to the output, see `device.evaluation_pass`; `batches`, not shuffled,
    hold positions in `samples`; `advance` is called with the number of images of each. FloatingPointError names an
    image whose output is not finite.
    """
    was_training = network.training
    network.eval()
    found: list[tuple[Tensor, Tensor]] = [(torch.empty(0, len(classes), dtype=torch.float64), torch.empty(0).long())]
    try:
        for images, _, where in batches:
            output = forward(images).double().softmax(dim=1).cpu()
            bad = (~output.isfinite()).any(dim=1).nonzero().flatten()
            if len(bad):
                name, count = samples[int(where[bad[0]])].path.name, f"{len(bad)} of {len(output)}"
                raise FloatingPointError(
                    f"the network's output is not finite for {count} images of a batch, e.g. {name}."
                )
            found.append((output, where.cpu()))
            advance(len(where))
    finally:
        network.train(was_training)
    parts: list[Any] = [found] * world_size()
    if len(parts) > 1:
        torch.distributed.all_gather_object(parts, found)
    table, places = (torch.cat(pieces) for pieces in zip(*chain.from_iterable(parts), strict=True))
    order = places.argsort()
    return Predictions(table[order], tuple(samples[i] for i in places[order].tolist()), tuple(classes))
