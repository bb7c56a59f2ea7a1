"""What a network said about each image."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ernet_fast.console.atomic_file import write_csv
from ernet_fast.data import Sample
from ernet_fast.train.device import world_size

_COLUMNS = ("image", "patient", "magnification", "true", "predicted")
_PROBABILITY = "p_"


class _Recorded(Sample):
    """A sample of a file of predictions: `path` is its name with a suffix, folders included where names have them."""

    @property
    def name(self) -> str:
        return os.fspath(self.path.with_suffix(""))


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
        """The images of each magnification there is, by ``"40X"`` and so on."""
        found = sorted({sample.magnification for sample in self.samples})
        return {f"{m}X": self.subset(lambda sample, m=m: sample.magnification == m) for m in found}  # type: ignore[misc]

    def loss(self) -> float | None:
        """Cross-entropy, without weights or smoothing: the mean of -ln p(true class); None without images."""
        if not len(self):
            return None
        true = self.probabilities[torch.arange(len(self)), self.targets]
        return float(-true.clamp_min(1e-12).log().mean())

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """One line an image: name, patient, magnification, true and predicted class, probability of each class, with
        all digits: `read_csv` gives the same numbers.
        """
        rows: list[list[Any]] = [[*_COLUMNS, *(f"{_PROBABILITY}{name}" for name in self.classes)]]
        for sample, guess, row in zip(self.samples, self.predicted.tolist(), self.probabilities.tolist(), strict=True):
            names = self.classes[sample.label], self.classes[guess]
            image = sample.name + sample.path.suffix
            rows.append([image, sample.patient, sample.magnification, *names, *map(repr, row)])
        write_csv(path, rows)

    @classmethod
    def read_csv(cls, path: str | os.PathLike[str]) -> Predictions:
        """The inverse of `write_csv`. Its samples know name, class, patient and magnification, and no more.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no such table; the message names file and line.
        """
        with open(path, newline="", encoding="utf-8") as file:
            table = csv.reader(file)
            header = next(table, [])
            names = header[len(_COLUMNS) :]
            if tuple(header[: len(_COLUMNS)]) != _COLUMNS or not names or not all(n.startswith("p_") for n in names):
                raise ValueError(f"{os.fspath(path)!r} is no predictions.csv: its columns are {', '.join(header)}.")
            classes = tuple(name.removeprefix(_PROBABILITY) for name in names)
            samples, rows = [], []
            for number, row in enumerate(table, 2):
                try:
                    image, patient, magnification, true, _ = row[: len(_COLUMNS)]
                    where = {"patient": patient, "magnification": int(magnification), "slide": "", "sequence": ""}
                    samples.append(_Recorded(path=Path(image), label=classes.index(true), subtype="", **where))  # type: ignore[arg-type]
                    rows.append([float(text) for text in row[len(_COLUMNS) :]])
                    if len(rows[-1]) != len(classes):
                        raise ValueError(f"it has {len(rows[-1])} probabilities of {len(classes)} classes")
                except ValueError as error:
                    raise ValueError(f"{os.fspath(path)!r}, line {number}: {error}.") from error
        table_of = torch.tensor(rows, dtype=torch.float64).view(len(rows), len(classes))
        return cls(table_of, tuple(samples), classes)


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
