"""File names and folders of BreakHis: what they say, and where they disagree."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

MAGNIFICATIONS = (40, 100, 200, 400)
LABELS = ("benign", "malignant")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


class Subtype(NamedTuple):
    """One of the eight tumour types: folder name and class (0 benign, 1 malignant)."""

    folder: str
    malignant: int


SUBTYPES = {
    "A": Subtype("adenosis", 0),
    "F": Subtype("fibroadenoma", 0),
    "PT": Subtype("phyllodes_tumor", 0),
    "TA": Subtype("tubular_adenoma", 0),
    "DC": Subtype("ductal_carcinoma", 1),
    "LC": Subtype("lobular_carcinoma", 1),
    "MC": Subtype("mucinous_carcinoma", 1),
    "PC": Subtype("papillary_carcinoma", 1),
}

_NAME = re.compile(
    r"SOB_(?P<cls>[BM])_(?P<subtype>[A-Z]+)-(?P<year>\d{2})-(?P<number>\d+)(?P<part>[A-Z]*)"
    r"-(?P<magnification>\d+)-(?P<sequence>\d+)"
)
# Pictures in a format that the data set does not use: worth a report, unlike a README or a Thumbs.db.
OTHER_IMAGE_SUFFIXES = (".bmp", ".gif", ".webp", ".jp2", ".jpe", ".jfif")


class Sample(NamedTuple):
    """One image of the data set."""

    path: Path
    label: int  # class index under the data set's target
    subtype: str  # one of the codes of `SUBTYPES`
    slide: str  # with its year: 14-22549AB
    patient: str  # the digits of the slide's number: 22549
    magnification: int
    sequence: str  # the image's number as written: 007

    @property
    def name(self) -> str:
        """File name without its suffix; it identifies the image within the data set, wherever the folder lies."""
        return self.path.stem

    @property
    def malignant(self) -> int:
        """1 for a malignant tumour, 0 for a benign one, whatever the target."""
        return SUBTYPES[self.subtype].malignant

    @property
    def split_class(self) -> int:
        """The class that a split is stratified by."""
        return self.malignant


class Skipped(NamedTuple):
    """A file that was left out, and why."""

    path: Path
    reason: str


def parse_name(path: str | os.PathLike[str]) -> Sample:
    """Read what a BreakHis file name says, e.g. ``SOB_B_TA-14-16184CD-40-007.png``; `label` is 0 benign, 1 malignant.

    Only the last component of `path` is looked at and the file need not exist.

    Raises:
        ValueError: the name does not follow ``SOB_<B|M>_<type>-<year>-<slide>-<magnification>-<sequence>``, or
            contradicts itself.
    """
    path = Path(path)
    match = _NAME.fullmatch(path.stem)
    if match is None:
        raise ValueError(
            f"file name {path.name!r} does not parse; "
            f"expected SOB_<B|M>_<type>-<year>-<slide>-<magnification>-<sequence>, e.g. SOB_M_DC-14-11031-200-003.png"
        )
    code, magnification = match["subtype"], int(match["magnification"])
    if code not in SUBTYPES:
        raise ValueError(f"file name {path.name!r} has tumour type {code!r}; expected one of {', '.join(SUBTYPES)}")
    letter = "BM"[SUBTYPES[code].malignant]
    if match["cls"] != letter:
        raise ValueError(f"file name {path.name!r} has class {match['cls']!r}, but type {code} is {letter!r}")
    if magnification not in MAGNIFICATIONS:
        raise ValueError(f"file name {path.name!r} has magnification {magnification}; expected one of {MAGNIFICATIONS}")
    slide = f"{match['year']}-{match['number']}{match['part']}"
    return Sample(path, SUBTYPES[code].malignant, code, slide, match["number"], magnification, match["sequence"])


def magnifications_of(magnifications: int | Iterable[int]) -> tuple[int, ...]:
    """One or several magnifications in ascending order; raises ValueError for others."""
    wanted = {magnifications} if isinstance(magnifications, int) else set(magnifications)
    if not wanted or not wanted <= set(MAGNIFICATIONS):
        raise ValueError(f"magnifications={magnifications!r}; expected one or several of {MAGNIFICATIONS}")
    return tuple(sorted(wanted))


def image_path(tree: Path, subtype: str, slide: str, magnification: int, sequence: str, suffix: str = ".png") -> Path:
    """Where the official layout puts an image below `tree` (the folder that holds ``breast/``)."""
    folder, malignant = SUBTYPES[subtype]
    name = f"SOB_{'BM'[malignant]}_{subtype}"
    place = tree / "breast" / LABELS[malignant] / "SOB" / folder / f"{name}_{slide}" / f"{magnification}X"
    return place / f"{name}-{slide}-{magnification}-{sequence}{suffix}"


def find_tree(root: str | os.PathLike[str]) -> Path:
    """The folder that holds ``breast/benign`` and ``breast/malignant``: `root`, or the only one below it.

    `root` may be ``breast`` itself too. Links to folders are followed; hidden folders are not searched.

    Raises:
        FileNotFoundError: `root` does not exist or holds no such folder.
        NotADirectoryError: `root` is a file, e.g. the archive that still has to be unpacked.
        ValueError: there are several; the message lists them.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(
            f"root {str(root)!r} does not exist; give the folder BreaKHis_v1.tar.gz was unpacked to"
        )
    if not root.is_dir():
        raise NotADirectoryError(
            f"root {str(root)!r} is a file; give a folder (unpack an archive first: tar -xzf BreaKHis_v1.tar.gz)"
        )
    if root.name == "breast" and _is_breast(root):
        return root.parent
    trees, seen = [], set()
    for folder, children, _ in walk(root, OSError):
        real = os.path.realpath(folder)
        is_tree = "breast" in children and _is_breast(folder / "breast")
        if is_tree and real not in seen:
            trees.append(folder)
        if is_tree or real in seen:  # or a second way, over a link, to a folder that was searched
            children.clear()
        seen.add(real)
    if not trees:
        raise FileNotFoundError(
            f"no BreakHis data below {str(root)!r}: expected a folder breast/benign or breast/malignant, as in "
            f"BreaKHis_v1/histology_slides/breast/benign/SOB/adenosis/..."
        )
    if len(trees) > 1:
        raise ValueError(f"root {str(root)!r} holds {len(trees)} data sets, choose one: " + ", ".join(map(str, trees)))
    return trees[0]


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name holds no data: hidden, or the resource forks in an archive from a Mac."""
    return name.startswith(".") or name == "__MACOSX"


def _is_breast(folder: Path) -> bool:
    return any((folder / label).is_dir() for label in LABELS)


def walk(
    folder: Path, *ignored: type[OSError], above: frozenset[str] = frozenset()
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """As `os.walk`, in name order: follows links but not in circles, omits hidden entries, raises all but `ignored`."""
    real = os.path.realpath(folder)
    visible: list[tuple[str, bool]] = []
    if real not in above:
        with contextlib.suppress(*ignored), os.scandir(folder) as entries:
            visible = sorted((entry.name, entry.is_dir()) for entry in entries if not is_hidden(entry.name))
    children = [name for name, is_dir in visible if is_dir]
    yield folder, children, [name for name, is_dir in visible if not is_dir]
    for child in children:
        yield from walk(folder / child, *ignored, above=above | {real})


def scan_tree(tree: Path) -> tuple[list[Sample], list[Skipped]]:
    """Every image below `tree`/breast in name order, and every picture that cannot be used with the reason.

    Hidden files and files that are no pictures (by suffix) are not looked at. Among the problems are images whose
    folders contradict their names, and all files of one name (``x.png`` and ``x.jpg``).

    Raises:
        OSError: a folder cannot be read.
    """
    found: dict[str, list[Sample]] = {}
    problems: list[Skipped] = []
    for folder, _, files in walk(tree / "breast"):
        for file in files:
            path = folder / file
            if path.suffix.lower() in IMAGE_SUFFIXES + OTHER_IMAGE_SUFFIXES:
                try:
                    sample = _read_entry(tree, path)
                    found.setdefault(sample.name, []).append(sample)
                except ValueError as error:
                    problems.append(Skipped(path, str(error)))
    for same in found.values():
        paths = sorted(sample.path for sample in same)
        reason = "the same image name occurs as " + " and ".join(map(str, paths))
        problems += [Skipped(path, reason) for path in paths if len(paths) > 1]
    return [found[name][0] for name in sorted(found) if len(found[name]) == 1], sorted(problems)


def _read_entry(tree: Path, path: Path) -> Sample:
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"image format {path.suffix!r} is not supported; expected {', '.join(IMAGE_SUFFIXES)}")
    sample = parse_name(path)
    expected = image_path(tree, sample.subtype, sample.slide, sample.magnification, sample.sequence, path.suffix)
    if path.parent != expected.parent:
        found, wanted = path.parent.relative_to(tree), expected.parent.relative_to(tree)
        raise ValueError(f"file name and folder disagree: it lies in {found}, its name says {wanted}")
    return sample
