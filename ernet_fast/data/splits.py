"""Stratified train, validation and test splits that keep a patient's images together.

A share of the patients (30 %) is the test set; the others are dealt into folds (5), of which `val` is one and `train`
the others: about 56 % / 14 % / 30 % of the images, with the same test set for every fold.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ernet_fast.console.atomic_file import write_csv
from ernet_fast.data.layout import LABELS, MAGNIFICATIONS, SUBTYPES, Sample, parse_name

SPLIT_NAMES = ("train", "val", "test", "trainval", "all")
_COLUMNS = ("image", "patient", "subtype", "split", "fold")
_TRIALS = 64  # enough for even parts, few enough for every seed to give another split


class SplitRow(NamedTuple):
    """Where one image belongs: `fold` counts from 0, None is the test set. `image` is the file name without suffix."""

    image: str
    patient: str
    subtype: str
    fold: int | None


@dataclass(frozen=True)
class Splits:
    """A complete assignment of images to the test set and `num_folds` folds, sorted by image name."""

    rows: tuple[SplitRow, ...]
    num_folds: int

    @cached_property
    def fold_of(self) -> dict[str, int | None]:
        """Image name to its fold, None for the test set."""
        return {row.image: row.fold for row in self.rows}

    @cached_property
    def by(self) -> str:
        """``"patient"`` where every patient's images lie in one part, else ``"image"``."""
        parts: dict[str, int | None] = {}
        return "patient" if all(parts.setdefault(row.patient, row.fold) == row.fold for row in self.rows) else "image"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint: the number of folds, and image name to fold; to patient and class, where the
        names do not say them.
        """
        values: dict[str, Any] = {"num_folds": self.num_folds, "fold_of": dict(self.fold_of)}
        foreign = {row.image: [row.patient, row.subtype] for row in self.rows if not _says(row)}
        return values | {"named": foreign} if foreign else values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Splits:
        """The inverse of `to_dict`. Raises KeyError or ValueError if these are not the values of a split."""
        num_folds, rows = values["num_folds"], []
        for image, fold in values["fold_of"].items():
            if fold is not None and not 0 <= fold < num_folds:
                raise ValueError(f"image {image!r} is in fold {fold!r} of {num_folds}")
            if image in values.get("named", {}):
                patient, subtype = values["named"][image]
            else:
                patient, subtype = parse_name(f"{image}.png").patient, parse_name(f"{image}.png").subtype
            rows.append(SplitRow(image, patient, subtype, fold))
        return cls(tuple(sorted(rows)), num_folds)

    def select(self, samples: Iterable[Sample], split: str, fold: int = 0) -> list[Sample]:
        """The samples of a split (one of `SPLIT_NAMES`) when fold `fold` is the validation fold.

        Raises:
            ValueError: `split` or `fold` is out of range.
            KeyError: a sample is in no part.
        """
        if split not in SPLIT_NAMES:
            raise ValueError(f"split={split!r}; expected one of {', '.join(map(repr, SPLIT_NAMES))}")
        if split in ("train", "val") and not 0 <= fold < self.num_folds:
            raise ValueError(f"fold={fold}; expected 0 <= fold < {self.num_folds}")
        belongs = {
            "train": lambda part: part not in (None, fold),
            "val": lambda part: part == fold,
            "test": lambda part: part is None,
            "trainval": lambda part: part is not None,
            "all": lambda part: True,
        }[split]
        return [sample for sample in samples if belongs(self.fold_of[sample.name])]


def _says(row: SplitRow) -> bool:
    """Whether the image's name is one of BreakHis and says patient and class itself."""
    try:
        named = parse_name(f"{row.image}.png")
    except ValueError:
        return False
    return (named.patient, named.subtype) == (row.patient, row.subtype)


class _Unit(NamedTuple):
    """Images that must not be separated."""

    key: str
    label: int  # majority label: patients and classes are counted by it
    stratum: tuple[int | str, ...]
    samples: tuple[Sample, ...]


def make_splits(
    samples: Iterable[Sample], *, by: str = "patient", test_fraction: float = 0.3, num_folds: int = 5, seed: int = 0
) -> Splits:
    """Divide images into a test set and folds, stratified by class.

    ``by="patient"``: whole patients (the digits of the slide id) are dealt. Of each class,
    ``round(test_fraction * n)`` patients are held out and the folds get equally many of the others, give or take one;
    a patient of both classes counts for the more frequent one. Of 64 random ways to do so, the one with the most even
    image counts (in all, by subtype and by magnification) is taken. ``by="image"``: single images, stratified by
    subtype and magnification, as the ERNet paper did; scores then say little about new patients. (One image that is
    filed under two subtypes stays together.)

    The result depends on file names and the other arguments alone: not on the order of `samples`, nor on the version
    of NumPy or torch. The test set does not depend on `num_folds`.

    Raises:
        ValueError: a class has too few patients (or images) for the test set and the folds (fewer than 7 with the
            defaults), two samples have one name, or an argument is out of range.
    """
    samples = sorted(samples, key=lambda sample: sample.name)
    _check_arguments(samples, by, test_fraction, num_folds)
    units = _units(samples, by)
    trials = _TRIALS if by == "patient" else 1  # single images: every deal is even
    fold: dict[str, int] = {}
    for label, count in sorted(Counter(unit.label for unit in units).items()):
        # the rounded share, halves up, whatever the last bit of 0.3 * k
        taken = [math.floor(test_fraction * k + 0.5 + 1e-9) for k in range(count + 1)]
        if count - taken[-1] < num_folds or (test_fraction > 0 and taken[-1] == 0):
            raise ValueError(
                f"class {_class_name(samples, label)!r} has too few {by}s: of {count}, test_fraction={test_fraction} "
                f"holds out {taken[-1]} and leaves {count - taken[-1]} for num_folds={num_folds}, but each part needs "
                f"one. Lower num_folds or change test_fraction" + (", or split by image" if by == "patient" else "")
            )
        members = [unit for unit in units if unit.label == label]
        # Those held out are spread evenly over the strata: the rounded share of the first k, for every k.
        held_out = [taken[k + 1] > taken[k] for k in range(count)]
        part = _most_even(members, (1 - test_fraction, test_fraction), seed, trials, held_out)
        kept = [unit for unit in members if not part[unit.key]]
        # A class begins at the fold after the last one's end, which keeps the folds' totals even.
        folds = [(len(fold) + k) % num_folds for k in range(len(kept))]
        fold |= _most_even(kept, [1 / num_folds] * num_folds, seed, trials, folds)
    rows = [SplitRow(s.name, s.patient, s.subtype, fold.get(unit.key)) for unit in units for s in unit.samples]
    return Splits(tuple(sorted(rows)), num_folds)


def _class_name(samples: Sequence[Sample], label: int) -> str:
    first = next(sample for sample in samples if sample.split_class == label)
    return LABELS[label] if type(first) is Sample else first.subtype


def _check_arguments(samples: Sequence[Sample], by: str, test_fraction: float, num_folds: int) -> None:
    if by not in ("patient", "image"):
        raise ValueError(f"by={by!r}; expected 'patient' or 'image'")
    if not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction={test_fraction}; expected 0 <= test_fraction < 1")
    if num_folds < 2:
        raise ValueError(f"num_folds={num_folds}; expected at least 2 (one to validate on, the others to train on)")
    if not samples:
        raise ValueError("samples is empty: there is nothing to split")
    for first, second in pairwise(samples):
        if first.name == second.name:
            raise ValueError(f"samples holds two images named {first.name!r}: {first.path} and {second.path}")


def _units(samples: Sequence[Sample], by: str) -> list[_Unit]:
    """The images of each patient, or each image with its copies under other subtypes."""
    groups: dict[str, list[Sample]] = {}
    for s in samples:
        groups.setdefault(s.patient if by == "patient" else f"{s.slide}-{s.magnification}-{s.sequence}", []).append(s)
    units = []
    for key, members in groups.items():
        times = Counter(sample.split_class for sample in members)
        label = max(times, key=lambda found: (times[found], found))
        stratum: tuple[int | str, ...] = (label,)
        if by == "image":
            stratum = (label, "+".join(sample.subtype for sample in members), members[0].magnification)
        units.append(_Unit(key, label, stratum, tuple(members)))
    return units


def _most_even(
    units: Sequence[_Unit], shares: Sequence[float], seed: int, trials: int, parts: Sequence[int]
) -> dict[str, int]:
    """The part of each unit, in the one of `trials` random deals whose image counts are the most even (chi-square).

    A deal orders the units by stratum, at random within each, and gives each the part in the same place of `parts`.
    """
    kinds = _Kinds.of(sample for unit in units for sample in unit.samples)
    counts = {unit.key: _image_counts(unit, kinds) for unit in units}
    expected = np.outer(shares, np.sum(list(counts.values()), axis=0))
    best: tuple[float, dict[str, int]] = math.inf, {}
    for trial in range(trials):
        draw = {u.key: hashlib.sha256(f"{seed}/{trial}/{u.key}".encode()).digest() for u in units}
        shuffled = sorted(units, key=lambda u: (str(u.stratum), draw[u.key]))
        part = {unit.key: int(p) for unit, p in zip(shuffled, parts, strict=True)}
        observed = np.zeros_like(expected)
        for key, p in part.items():
            observed[p] += counts[key]
        unevenness = float(np.sum((observed - expected) ** 2 / np.maximum(expected, 1.0)))
        if unevenness < best[0] * (1 - 1e-9):  # equal up to rounding is equal, on every machine
            best = unevenness, part
    return best[1]


def _image_counts(unit: _Unit, kinds: _Kinds) -> list[int]:
    """Images in all (fourfold, to weigh as much as the magnifications), by subtype, by class and magnification."""
    subtypes = Counter(sample.subtype for sample in unit.samples)
    cells = Counter((sample.split_class, sample.magnification) for sample in unit.samples)
    total = [len(unit.samples)] * len(MAGNIFICATIONS)
    return total + [subtypes[code] for code in kinds.subtypes] + [cells[cell] for cell in kinds.cells]


class _Kinds(NamedTuple):
    """What images are counted by."""

    subtypes: tuple[str, ...]
    cells: tuple[tuple[int, int], ...]  # class and magnification

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> _Kinds:
        """Those of BreakHis, whether there are images or not; of other data, those that occur."""
        samples = list(samples)
        if all(type(sample) is Sample for sample in samples):
            return cls(tuple(SUBTYPES), tuple((label, m) for label in range(2) for m in MAGNIFICATIONS))
        subtypes = sorted({sample.subtype for sample in samples})
        return cls(tuple(subtypes), tuple(sorted({(s.split_class, s.magnification) for s in samples})))


def write_split_csv(path: str | os.PathLike[str], splits: Splits) -> Path:
    """Write a line an image, atomically: ``image,patient,subtype,split,fold``; split is ``test`` or ``trainval``."""
    parts = [("test", "") if row.fold is None else ("trainval", row.fold) for row in splits.rows]
    write_csv(path, [_COLUMNS, *((*row[:3], *part) for row, part in zip(splits.rows, parts, strict=True))])
    return Path(path)


def read_split_csv(path: str | os.PathLike[str], *, any_names: bool = False) -> Splits:
    """Read a file that `write_split_csv` wrote, or one made by hand with the same columns in any order.

    With `any_names` images need not have names of BreakHis, which the other columns are compared with.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, an image is listed twice, or a line contradicts itself; the message has file
            and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no split file at {str(path)!r}")
    rows: dict[str, SplitRow] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{path}: no column {', '.join(missing)}; expected {','.join(_COLUMNS)}")
            for record in reader:
                where = f"{path}, line {reader.line_num}"
                row = _parse_row(record, where, any_names)
                if rows.setdefault(row.image, row) is not row:
                    raise ValueError(f"{where}: image {row.image!r} is listed twice")
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}") from None
    if not rows:
        raise ValueError(f"{path} lists no images")
    used = sorted({row.fold for row in rows.values() if row.fold is not None})
    if len(used) < 2 or used != list(range(len(used))):
        raise ValueError(f"{path}: folds {used}; expected 0, 1, ... without gaps and at least two")
    return Splits(tuple(sorted(rows.values())), len(used))


def read_published_fold(
    path: str | os.PathLike[str], *, num_folds: int = 5, seed: int = 0, by: str = "patient"
) -> Splits:
    """Read one of the published folds of BreakHis, ``dsfold1.txt`` to ``dsfold5.txt`` (Spanhol et al., IEEE TBME 2016).

    A line is ``image|magnification|fold|train`` or ``...|test``. The images of ``test`` are the test set; those of
    ``train`` are dealt into `num_folds` folds as by `make_splits`, to validate on, which the published ones do not.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that reads otherwise, or an image that is listed twice; the message has file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file with a fold at {str(path)!r}")
    parts: dict[str, str] = {}
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        where, columns = f"{path}, line {number}", [column.strip() for column in line.split("|")]
        if columns == [""]:
            continue
        if len(columns) != 4 or columns[3] not in ("train", "test"):
            raise ValueError(f"{where}: {line[:60]!r}; expected image|magnification|fold|train, or test")
        try:
            sample = parse_name(columns[0])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if parts.setdefault(sample.name, columns[3]) != columns[3] or columns[1] != str(sample.magnification):
            raise ValueError(f"{where}: image {sample.name!r} is in both parts, or its magnification another")
        samples.append(sample)
    trained = {sample.name: sample for sample in samples if parts[sample.name] == "train"}
    rows = list(make_splits(trained.values(), by=by, test_fraction=0.0, num_folds=num_folds, seed=seed).rows)
    held_out = {s.name: SplitRow(s.name, s.patient, s.subtype, None) for s in samples if s.name not in trained}
    return Splits(tuple(sorted([*rows, *held_out.values()])), num_folds)


def is_published_fold(path: str | os.PathLike[str]) -> bool:
    """Whether the first line of a file is one of a published fold."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.readline().count("|") == 3


def _parse_row(record: dict[str | None, str | None], where: str, any_names: bool) -> SplitRow:
    image, patient, subtype, split, fold = ((record.get(column) or "").strip() for column in _COLUMNS)
    try:
        named = None if any_names else parse_name(image + ".png")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if named is not None and (named.patient, named.subtype) != (patient, subtype):
        raise ValueError(
            f"{where}: patient {patient!r}, subtype {subtype!r}; "
            f"the image name {image!r} says {named.patient!r}, {named.subtype!r}"
        )
    if split == "test" and not fold:
        return SplitRow(image, patient, subtype, None)
    if split == "trainval" and fold.isascii() and fold.isdigit():
        return SplitRow(image, patient, subtype, int(fold))
    raise ValueError(
        f"{where}: split {split!r}, fold {fold!r}; expected test without a fold, or trainval with a fold 0, 1, ..."
    )
