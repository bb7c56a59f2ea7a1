"""Fields of one slide or patient as a bag."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ernet_fast.data import Sample

UNITS = ("slide", "patient")


class Bag(NamedTuple):
    """Fields that share a label: their places in a list of samples."""

    name: str
    label: int
    fields: tuple[int, ...]


class Batch(NamedTuple):
    """B bags of up to N fields: embeddings [B, N, D], magnifications [B, N], which are there [B, N], labels [B]."""

    embeddings: Tensor
    magnification: Tensor
    there: Tensor
    labels: Tensor


def make_bags(samples: Sequence[Sample], by: str = "slide") -> list[Bag]:
    """The fields of each slide, or each patient, in name order.

    A slide that is filed under two labels, or a patient who has two, makes a bag for each of them.

    Raises ValueError for another `by`.
    """
    if by not in UNITS:
        raise ValueError(f"by={by!r}; expected one of {', '.join(map(repr, UNITS))}.")
    found: dict[tuple[str, int], list[int]] = {}
    for place, sample in enumerate(samples):
        found.setdefault((sample.slide if by == "slide" else sample.patient, sample.label), []).append(place)
    return [Bag(name, label, tuple(places)) for (name, label), places in sorted(found.items())]


def chosen_fields(bag: Bag, count: int, generator: torch.Generator) -> list[int]:
    """At most `count` of a bag's fields, at random."""
    if len(bag.fields) <= count:
        return list(bag.fields)
    return [bag.fields[k] for k in torch.randperm(len(bag.fields), generator=generator)[:count].tolist()]


def collate(
    bags: Sequence[Bag], fields: Sequence[Sequence[int]], embeddings: Sequence[Tensor], magnification: Tensor
) -> Batch:
    """Pad bags to one length.

    Args:
        bags: B bags.
        fields: the places of each that take part.
        embeddings: [n, D] of the places of each bag's `fields`, in their order.
        magnification: int64 of every sample.
    """
    longest = max(map(len, fields))
    padded = embeddings[0].new_zeros((len(bags), longest, embeddings[0].shape[1]))
    powers = magnification[0].repeat(len(bags), longest)
    there = torch.zeros(len(bags), longest, dtype=torch.bool)
    for row, (places, values) in enumerate(zip(fields, embeddings, strict=True)):
        padded[row, : len(places)] = values
        powers[row, : len(places)] = magnification[list(places)]
        there[row, : len(places)] = True
    labels = torch.tensor([bag.label for bag in bags])
    return Batch(padded, *(part.to(padded.device) for part in (powers, there, labels)))
