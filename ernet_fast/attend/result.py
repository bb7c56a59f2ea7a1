"""What attention found for every bag, and figures of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ernet_fast.attend.bags import Bag
from ernet_fast.attend.settings import AttendSettings
from ernet_fast.data import Sample
from ernet_fast.train.metrics import compute_metrics
from ernet_fast.train.predictions import Predictions

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class BagResult:
    """One bag: its part of the split, class probabilities by attention and by the mean over its images, weights."""

    part: str
    bag: Bag
    patient: str
    probabilities: tuple[float, ...]
    mean_probabilities: tuple[float, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class AttendResult:
    """What `attend` found. `samples` are all images; a bag's `fields` are places in them."""

    folder: Path
    classes: tuple[str, ...]
    settings: AttendSettings
    samples: tuple[Sample, ...]
    bags: tuple[BagResult, ...]
    history: list[dict[str, Any]]
    checkpoint: dict[str, Any]

    def metrics(self, part: str = "test") -> dict[str, dict[str, Any]]:
        """Figures over the bags of a part of the split: by attention, and by the mean of the images' probabilities."""
        chosen = [entry for entry in self.bags if entry.part == part]
        labelled = tuple(self.samples[entry.bag.fields[0]] for entry in chosen)
        found = {}
        for name in ("probabilities", "mean_probabilities"):
            rows = [getattr(entry, name) for entry in chosen]
            table = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(self.classes))
            figures = compute_metrics(Predictions(table, labelled, self.classes))
            found["attention" if name == "probabilities" else "mean"] = {"bags": figures.pop("images"), **figures}
        return found

    def attention_by_magnification(self, part: str = "test") -> dict[int, dict[str, float]]:
        """Of each magnification: mean share of attention, and of fields, over the bags that have such fields."""
        found: dict[int, list[tuple[float, float]]] = {}
        for entry in self.bags:
            powers = [self.samples[place].magnification for place in entry.bag.fields]
            for power in set(powers) if entry.part == part else ():
                which = [k for k, other in enumerate(powers) if other == power]
                share = sum(entry.weights[k] for k in which), len(which) / len(powers)
                found.setdefault(power, []).append(share)
        return {
            power: {"attention": sum(a for a, _ in s) / len(s), "fields": sum(f for _, f in s) / len(s), "bags": len(s)}
            for power, s in sorted(found.items())
        }
