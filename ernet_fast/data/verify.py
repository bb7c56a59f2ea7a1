"""Whether a folder in the BreakHis layout is whole and sound."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernet_fast.data import published
from ernet_fast.data.image_io import ImageReadError, read_pixels
from ernet_fast.data.layout import LABELS, MAGNIFICATIONS, SUBTYPES, Sample, Skipped, find_tree, scan_tree


@dataclass(frozen=True)
class Verification:
    """What is there, and what is wrong with it; empty lists where nothing is.

    Attributes:
        tree: the folder that holds ``breast/``.
        samples: every image whose name and folder agree, in name order.
        unusable: pictures whose name, folder or format cannot be used, with the reason.
        unreadable: images that are damaged or no 8-bit RGB, with the reason.
        duplicates: groups of images of the same pixels.
        mixed_patients: patients with benign and malignant images.
        several_types: patients with more than one tumour type, and the types. Three of the published ones have.
        other_sizes: images by (height, width), without those of 460x700 pixels.
        differences: (tumour type, magnification, images found, images published) where the two differ; None if the
            counts were not to be compared.
    """

    tree: Path
    samples: tuple[Sample, ...]
    unusable: tuple[Skipped, ...]
    unreadable: tuple[Skipped, ...]
    duplicates: tuple[tuple[Sample, ...], ...]
    mixed_patients: tuple[str, ...]
    several_types: dict[str, tuple[str, ...]]
    other_sizes: dict[tuple[int, int], int]
    differences: tuple[tuple[str, int, int, int], ...] | None

    @property
    def is_sound(self) -> bool:
        """No file unusable or unreadable, no duplicate, no patient in two classes, and the counts as published.

        Sizes and patients of several types are told and are no faults.
        """
        faults = (self.unusable, self.unreadable, self.duplicates, self.mixed_patients, self.differences)
        return not any(faults)

    def counts(self) -> dict[str, dict[int, int]]:
        """Images of each tumour type at each magnification."""
        there = Counter((sample.subtype, sample.magnification) for sample in self.samples)
        return {code: {m: there[code, m] for m in MAGNIFICATIONS} for code in SUBTYPES}

    def figures(self) -> dict[str, Any]:
        """Everything as plain values."""
        counts = self.counts()
        by_class = {
            name: {m: sum(counts[code][m] for code, kind in SUBTYPES.items() if kind.malignant == label) for m in row}
            for label, (name, row) in enumerate((name, counts["A"]) for name in LABELS)
        }
        differences = None if self.differences is None else [
            {"type": code, "magnification": m, "found": found, "published": wanted}
            for code, m, found, wanted in self.differences
        ]  # fmt: skip
        return {
            "tree": str(self.tree),
            "sound": self.is_sound,
            "images": len(self.samples),
            "patients": len({sample.patient for sample in self.samples}),
            "slides": len({(sample.subtype, sample.slide) for sample in self.samples}),
            "counts": {code: {str(m): n for m, n in row.items()} for code, row in counts.items()},
            "counts_by_class": {name: {str(m): n for m, n in row.items()} for name, row in by_class.items()},
            "differences": differences,
            "unusable": [{"path": str(path), "reason": reason} for path, reason in self.unusable],
            "unreadable": [{"path": str(path), "reason": reason} for path, reason in self.unreadable],
            "duplicates": [
                {
                    "paths": [str(s.path) for s in group],
                    "across_patients": len({s.patient for s in group}) > 1,
                    "across_classes": len({s.malignant for s in group}) > 1,
                }
                for group in self.duplicates
            ],
            "patients_in_two_classes": list(self.mixed_patients),
            "patients_of_several_types": {patient: list(codes) for patient, codes in self.several_types.items()},
            "other_sizes": {f"{h}x{w}": count for (h, w), count in sorted(self.other_sizes.items())},
        }


def verify_data(
    root: str | os.PathLike[str],
    *,
    compare_counts: bool = True,
    workers: int | None = None,
    begin: Callable[[int], Callable[[], None]] | None = None,
) -> Verification:
    """Look at every image below `root`: name, folder, pixels.

    Each is decoded once, and only a hash of its pixels is kept, so that equal pictures are found whatever their file
    format and name.

    Args:
        root: as in `BreakHis`.
        compare_counts: hold the number of images of each type and magnification against those published; without it
            a part of the data set, or another in its layout, can be sound.
        workers: images decoded at the same time; default: one a core, at most 8.
        begin: called with the number of images, gives what to call after each.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: as `BreakHis`, where there is no one data set below `root`.
        ImportError: Pillow is missing.
    """
    tree = find_tree(root)
    samples, unusable = scan_tree(tree)
    advance = (lambda: None) if begin is None else begin(len(samples))

    def look(sample: Sample) -> tuple[bytes, tuple[int, int]] | str:
        try:
            pixels = read_pixels(sample.path)
        except (ImageReadError, OSError) as error:
            return str(error)
        return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest(), pixels.shape[:2]

    unreadable, same, sizes = [], defaultdict(list), Counter[tuple[int, int]]()
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter lock
        for sample, found in zip(samples, pool.map(look, samples), strict=True):
            if isinstance(found, str):
                unreadable.append(Skipped(sample.path, found))
            else:
                same[found[0]].append(sample)
                sizes[found[1]] += 1
            advance()
    del sizes[published.SIZE]
    classes, types = _by_patient(samples, "malignant"), _by_patient(samples, "subtype")
    return Verification(
        tree=tree,
        samples=tuple(samples),
        unusable=tuple(unusable),
        unreadable=tuple(unreadable),
        duplicates=tuple(tuple(group) for group in same.values() if len(group) > 1),
        mixed_patients=tuple(patient for patient, found in classes.items() if len(found) > 1),
        several_types={patient: tuple(sorted(found)) for patient, found in types.items() if len(found) > 1},
        other_sizes=dict(sizes),
        differences=tuple(_differences(samples)) if compare_counts else None,
    )


def _by_patient(samples: Iterable[Sample], what: str) -> dict[str, set[Any]]:
    found: dict[str, set[Any]] = defaultdict(set)
    for sample in samples:
        found[sample.patient].add(getattr(sample, what))
    return {patient: found[patient] for patient in sorted(found)}


def _differences(samples: Iterable[Sample]) -> list[tuple[str, int, int, int]]:
    there = Counter((sample.subtype, sample.magnification) for sample in samples)
    cells = [(code, m, there[code, m], wanted) for code, row in published.IMAGES.items() for m, wanted in row.items()]
    return [cell for cell in cells if cell[2] != cell[3]]
