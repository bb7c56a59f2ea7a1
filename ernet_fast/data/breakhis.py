"""The BreakHis data set of breast tumour images as a torch `Dataset`."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ernet_fast.data import layout
from ernet_fast.data.image_io import ImageReadError, read_image
from ernet_fast.data.layout import LABELS, SUBTYPES, Sample, Skipped
from ernet_fast.data.splits import (
    SPLIT_NAMES,
    Splits,
    is_published_fold,
    make_splits,
    read_published_fold,
    read_split_csv,
)

_LISTED = 10  # files named in an error before "and N more"


class BreakHis(Dataset[tuple[Any, Any]]):
    """Images of BreakHis, or of any folder in its layout, with patient-wise splits.

    `dataset[i]` is ``(image, target)``: a uint8 tensor [3, H, W] and an int class index, or what `transform` and
    `target_transform` make of them. The split is made over all images of the folder, by file names alone;
    `magnifications` selects afterwards, so a patient is in the same part at every magnification.

    Args:
        root: ``BreaKHis_v1``, ``histology_slides`` or any folder above them.
        split: ``"train"``, ``"val"``, ``"test"``, ``"trainval"`` (train and val together) or ``"all"``.
        magnifications: one or several of 40, 100, 200, 400; None is all.
        target: ``"binary"`` (0 benign, 1 malignant) or ``"subtype"`` (index into `classes`, eight of them).
        transform: of the uint8 image tensor.
        target_transform: of the class index.
        fold: the fold that ``"val"`` is and ``"train"`` is not.
        num_folds: folds that the images outside the test set are divided into. A `split_file` brings its own.
        split_by: ``"patient"``, or ``"image"`` as the ERNet paper did (a patient is then in train and test).
        seed: of the split.
        split_file: CSV of `write_split_csv`, used instead of a new split.
        splits: a split that was made before, used in the same way.
        on_error: ``"raise"``, or ``"skip"`` to list files that cannot be used in `skipped` instead of `samples`.
        verify: decode every selected image now, so that damage shows before training; default: if they may be skipped.

    Attributes:
        samples: list of `Sample`, in the order of their names.
        classes: class names, indexed by the target.
        targets: class index of each sample.
        skipped: list of `Skipped` (path, reason), empty with ``on_error="raise"``.
        splits: the `Splits` of the whole folder; None for ``split="all"`` without a `split_file`.

    Raises:
        FileNotFoundError: `root` or `split_file` is missing, or `root` holds no BreakHis folder.
        ValueError: an argument is out of range, `split_file` and `splits` are both given, the selection is empty, a
            class has too few patients, or (``on_error="raise"``) a name does not parse, contradicts its folder, occurs
            twice, or folder and `split_file` (or `splits`) differ in their images.
        ImageReadError: an image is damaged, truncated or not 8-bit RGB (now with `verify`, else when it is read).
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        *,
        magnifications: int | Iterable[int] | None = None,
        target: str = "binary",
        transform: Callable[[Tensor], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        fold: int = 0,
        num_folds: int = 5,
        split_by: str = "patient",
        seed: int = 0,
        split_file: str | os.PathLike[str] | None = None,
        splits: Splits | None = None,
        on_error: str = "raise",
        verify: bool | None = None,
    ) -> None:
        if split_file is not None and splits is not None:
            raise ValueError("split_file and splits are both given; expected one of them")
        for argument, value, choices in (
            ("split", split, SPLIT_NAMES),
            ("target", target, ("binary", "subtype")),
            ("split_by", split_by, ("patient", "image")),
            ("on_error", on_error, ("raise", "skip")),
        ):
            if value not in choices:
                raise ValueError(f"{argument}={value!r}; expected one of {', '.join(map(repr, choices))}")
        self.split, self.fold, self.target = split, fold, target
        self.transform, self.target_transform = transform, target_transform
        self._skip = on_error == "skip"
        self.skipped: list[Skipped] = []

        wanted = None if magnifications is None else self._wanted(magnifications)
        found, problems = self._scan(root)
        self._report(problems, f"image(s) of {self.root} cannot be used")
        if not found:
            raise ValueError(f"no usable image below {str(self.root)!r} ({len(problems)} unusable)")
        self.splits = splits
        if split_file is not None:
            self.splits = self._read_splits(split_file, num_folds=num_folds, seed=seed, by=split_by)
            if split_by == "patient" and self.splits.by == "image":
                raise ValueError(
                    f"split_file {str(split_file)!r} has images of one patient in several parts; "
                    "pass split_by='image' if that is meant"
                )
        if self.splits is not None:
            found = self._in_splits(self.splits, found, "the split" if split_file is None else os.fspath(split_file))
        elif split != "all":
            self.splits = make_splits(found, by=split_by, num_folds=num_folds, seed=seed)
        chosen = found if self.splits is None else self.splits.select(found, split, fold)
        self.samples = self._relabel(s for s in chosen if wanted is None or s.magnification in wanted)
        if self.samples and (self._skip if verify is None else verify):
            self._verify()
        self._check_not_empty(chosen, wanted)
        self.targets = [sample.label for sample in self.samples]
        self._warn_of_missing_classes(found)

    root: Path
    classes: list[str]

    def _wanted(self, magnifications: int | Iterable[int]) -> tuple[int, ...]:
        """The magnifications asked for, in ascending order."""
        return layout.magnifications_of(magnifications)

    def _scan(self, root: str | os.PathLike[str]) -> tuple[list[Sample], list[Skipped]]:
        """All images, and those that cannot be used; sets `root` and `classes`."""
        self.root = layout.find_tree(root)
        self.classes = list(LABELS) if self.target == "binary" else [kind.folder for kind in SUBTYPES.values()]
        return layout.scan_tree(self.root)

    def _read_splits(self, path: str | os.PathLike[str], **options: Any) -> Splits:
        if os.path.isfile(path) and is_published_fold(path):
            return read_published_fold(path, **options)
        return read_split_csv(path)

    def _path_of(self, image: str) -> Path:
        """Where the image of a name lies, or would."""
        s = layout.parse_name(image + ".png")
        return layout.image_path(self.root, s.subtype, s.slide, s.magnification, s.sequence)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        sample = self.samples[index]
        image, label = read_image(sample.path), sample.label
        return (
            image if self.transform is None else self.transform(image),
            label if self.target_transform is None else self.target_transform(label),
        )

    def __repr__(self) -> str:
        patients = len({sample.patient for sample in self.samples})
        classes = ", ".join(f"{name} {self.targets.count(index)}" for index, name in enumerate(self.classes))
        what = f"{type(self).__name__}({str(self.root)!r}, split={self.split!r}, fold={self.fold})"
        return f"{what}: {len(self)} images, {patients} patients ({classes})"

    def _report(self, problems: Sequence[Skipped], what: str) -> None:
        """Keep the problems as skips, or raise them all at once."""
        if self._skip:
            self.skipped.extend(problems)
        elif problems:
            lines = [f"  {path}: {reason}" for path, reason in problems[:_LISTED]]
            if len(problems) > _LISTED:
                lines.append(f"  and {len(problems) - _LISTED} more")
            advice = "Repair or remove them, or pass on_error='skip' to leave them out, listed in .skipped:"
            raise ValueError(f"{len(problems)} {what}. {advice}\n" + "\n".join(lines))

    def _in_splits(self, splits: Splits, found: list[Sample], source: str) -> list[Sample]:
        """The samples that the split covers; images of only one of split and folder are problems."""
        problems = [Skipped(s.path, f"not listed in {source}") for s in found if s.name not in splits.fold_of]
        there = {sample.name for sample in found} | {problem.path.stem for problem in self.skipped}
        for image in splits.fold_of.keys() - there:
            path = self._path_of(image)
            problems.append(Skipped(path, f"listed in {source}, but there is no such image"))
        self._report(sorted(problems), f"image(s) differ between {self.root} and {source}")
        return [sample for sample in found if sample.name in splits.fold_of]

    def _relabel(self, samples: Iterable[Sample]) -> list[Sample]:
        codes = list(SUBTYPES)
        return [s._replace(label=s.malignant if self.target == "binary" else codes.index(s.subtype)) for s in samples]

    def _verify(self) -> None:
        def damage(sample: Sample) -> str | None:
            try:
                read_image(sample.path)
            except (ImageReadError, OSError) as error:
                return str(error)
            return None

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter lock
            reasons = list(pool.map(damage, self.samples))
        damaged = [Skipped(s.path, why) for s, why in zip(self.samples, reasons, strict=True) if why is not None]
        if damaged and not self._skip:
            others = len(damaged) - 1
            more = f" (and {others} more of the {len(self.samples)} selected images)" if others else ""
            raise ImageReadError(damaged[0].reason + more)
        self.skipped.extend(damaged)
        self.samples = [s for s, why in zip(self.samples, reasons, strict=True) if why is None]

    def _check_not_empty(self, chosen: Sequence[Sample], wanted: Sequence[int] | None) -> None:
        if not self.samples:
            there = Counter(sample.magnification for sample in chosen)
            counts = ", ".join(f"{count} at {m}X" for m, count in sorted(there.items())) or "none"
            raise ValueError(
                f"no image is left for split={self.split!r}, fold={self.fold}, magnifications={wanted or 'all'} "
                f"of {self.root} (in this split: {counts}; skipped as unusable: {len(self.skipped)})"
            )

    def _warn_of_missing_classes(self, found: Sequence[Sample]) -> None:
        missing = sorted({sample.label for sample in self._relabel(found)} - set(self.targets))
        if missing:
            names = ", ".join(self.classes[label] for label in missing)
            where = f"split {self.split!r} (fold {self.fold})"
            reason = "too few patients, or none at the magnifications asked for"
            warnings.warn(f"{where} has no image of: {names} ({reason})", UserWarning, stacklevel=3)
