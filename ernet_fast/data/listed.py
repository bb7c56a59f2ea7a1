"""Images of any data set: one folder a class, or a CSV list."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path

from ernet_fast.data.breakhis import BreakHis
from ernet_fast.data.layout import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES, Sample, Skipped, find_tree, walk
from ernet_fast.data.splits import Splits, read_split_csv

LAYOUTS = ("auto", "breakhis", "folders", "csv")


class ListedSample(Sample):
    """An image whose name says nothing: `subtype` is its class, `sequence` its name, the path below the data set's
    folder without suffix; `magnification` is 0 where none is known.
    """

    __slots__ = ()

    @property
    def name(self) -> str:
        """The path below the data set's folder, without suffix."""
        return self.sequence

    @property
    def malignant(self) -> int:
        """The class index: these data sets have their own classes."""
        return self.label

    @property
    def split_class(self) -> int:
        """The class that a split is stratified by."""
        return self.label


class ListedImages(BreakHis):
    """Images in one folder a class, or in a CSV list; arguments and attributes as in `BreakHis`.

    Args:
        root: a folder whose folders are the classes, in the order of their names: ``root/class/image.png``, or
            ``root/class/patient/...`` with the images of each patient in a folder of its own; or a CSV file with the
            columns ``image`` (a path, relative to the file) and ``label``, and perhaps ``patient``, ``slide`` and
            ``magnification``. An image without a patient counts as a patient of its own.
        split: as in `BreakHis`; so are all others but `target`, which these data sets do not have.
    """

    def _wanted(self, magnifications: int | Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted({magnifications} if isinstance(magnifications, int) else set(magnifications)))

    def _scan(self, root: str | os.PathLike[str]) -> tuple[list[Sample], list[Skipped]]:
        path = Path(root)
        if not path.exists():
            raise FileNotFoundError(f"root {str(path)!r} does not exist; give a folder of images or a CSV list")
        self.root = path if path.is_dir() else path.parent
        rows, problems = _rows_of_folders(path) if path.is_dir() else _rows_of_list(path)
        self.classes = sorted({row.subtype for row in rows})
        if len(self.classes) < 2:
            raise ValueError(f"{str(path)!r} has images of {len(self.classes)} class(es); expected two at least")
        found = [row._replace(label=self.classes.index(row.subtype)) for row in sorted(rows, key=lambda r: r.name)]
        names: dict[str, Path] = {}
        for sample in found:
            if names.setdefault(sample.name, sample.path) != sample.path:
                reason = f"the same image name occurs as {names[sample.name]} and {sample.path}"
                problems += [Skipped(sample.path, reason), Skipped(names[sample.name], reason)]
        unusable = {problem.path for problem in problems}
        return [sample for sample in found if sample.path not in unusable], sorted(set(problems))

    def _read_splits(self, path: str | os.PathLike[str], **options: object) -> Splits:
        return read_split_csv(path, any_names=True)

    def _path_of(self, image: str) -> Path:
        return self.root / image

    def _relabel(self, samples: Iterable[Sample]) -> list[Sample]:
        return list(samples)


def _sample(path: Path, root: Path, label: str, patient: str, slide: str, magnification: int) -> ListedSample:
    relative = Path(os.path.relpath(path, root))
    name = relative.with_suffix("").as_posix()
    return ListedSample(path, 0, label, slide or patient or name, patient or name, magnification, name)


def _rows_of_folders(root: Path) -> tuple[list[Sample], list[Skipped]]:
    rows: list[Sample] = []
    problems = []
    for folder, _, files in walk(root):
        parts = folder.relative_to(root).parts
        for file in files:
            path = folder / file
            if path.suffix.lower() in OTHER_IMAGE_SUFFIXES:
                problems.append(Skipped(path, f"image format {path.suffix!r} is not supported"))
            elif path.suffix.lower() in IMAGE_SUFFIXES and not parts:
                problems.append(Skipped(path, "it lies in no folder of a class"))
            elif path.suffix.lower() in IMAGE_SUFFIXES:
                patient = parts[1] if len(parts) > 1 else ""
                rows.append(_sample(path, root, parts[0], patient, "", 0))
    return rows, problems


def _rows_of_list(path: Path) -> tuple[list[Sample], list[Skipped]]:
    rows: list[Sample] = []
    problems = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [column for column in ("image", "label") if column not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(
                    f"{path}: no column {', '.join(missing)}; expected image, label and perhaps patient, ..."
                )
            for record in reader:
                values = {key: (value or "").strip() for key, value in record.items() if isinstance(key, str)}
                where, magnification = f"{path}, line {reader.line_num}", values.get("magnification", "") or "0"
                if not values["image"] or not values["label"] or not magnification.isdecimal():
                    raise ValueError(
                        f"{where}: image {values['image']!r}, label {values['label']!r}, magnification "
                        f"{magnification!r}; expected a path, a class, and a whole number or nothing"
                    )
                image = path.parent / values["image"]
                sample = _sample(
                    image, path.parent, values["label"], values.get("patient", ""), values.get("slide", ""),
                    int(magnification),
                )  # fmt: skip
                rows.append(sample)
                if not image.is_file():
                    problems.append(Skipped(image, f"{where} lists it, but there is no such file"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}") from None
    return rows, problems


def layout_of(root: str | os.PathLike[str], layout: str = "auto") -> str:
    """What `root` is: "breakhis", "folders" or "csv"; `layout` itself unless it is "auto".

    A folder without ``breast/benign`` or ``breast/malignant`` below it is "folders" if two of its folders or more hold
    images; else "breakhis", whose error says what is missing.
    """
    if layout != "auto":
        return layout
    path = Path(root)
    if path.suffix.lower() == ".csv" and path.is_file():
        return "csv"
    try:
        find_tree(path)
    except FileNotFoundError:
        if path.is_dir() and sum(map(_holds_images, sorted(path.iterdir()))) >= 2:
            return "folders"
    except (ValueError, OSError):
        pass
    return "breakhis"


def _holds_images(folder: Path) -> bool:
    if not folder.is_dir() or folder.name.startswith("."):
        return False
    return any(Path(name).suffix.lower() in IMAGE_SUFFIXES for _, _, files in walk(folder) for name in files)
