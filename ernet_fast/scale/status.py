"""What became of every file of a run, and the table of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ernet_fast.console.atomic_file import write_csv

STATUSES = ("ok", "degenerate", "skipped", "error")


@dataclass(frozen=True, slots=True)
class FileStatus:
    """What became of a file.

    Attributes:
        input: the file.
        output: what was written, or None.
        status: "ok"; "degenerate": written, but without stains of its own to fit; "skipped": not read, or its output
            exists and is none of this run's; "error": not written.
        reason: why it is not "ok".
        width: of the image, in pixels.
        height: of the image, in pixels.
        tissue_share: pixels whose optical densities are all at least beta, as a fraction of all.
        stains: what the image was taken to be stained like, in the order of the method's columns
            (`ernet_fast.scale.method`); empty where nothing could be fitted.
        sha256: of the output, hexadecimal.
        input_sha256: of the input.
    """

    input: str
    output: str | None
    status: str
    reason: str = ""
    width: int | None = None
    height: int | None = None
    tissue_share: float | None = None
    stains: tuple[float, ...] = ()
    sha256: str = ""
    input_sha256: str = ""


FIELDS = ("input", "output", "status", "reason", "width", "height", "tissue_share", "sha256", "input_sha256")


@dataclass(frozen=True)
class Summary:
    """All files of a run in the order of their names, and how many were done before it."""

    files: list[FileStatus]
    columns: tuple[str, ...]  # of `FileStatus.stains`
    done_before: frozenset[str] = field(default_factory=frozenset)  # inputs

    @property
    def counts(self) -> Counter[str]:
        """How many files have each status."""
        return Counter(file.status for file in self.files)


def write_status(path: str | os.PathLike[str], files: Iterable[FileStatus], columns: Sequence[str]) -> None:
    """A CSV file of one row a file, with a header; numbers are written in full, fields without a value stay empty.

    Raises:
        ValueError: `path` does not end in .csv.
    """
    check_status_path(path)
    write_csv(path, [(*FIELDS, *columns), *(_row(file, len(columns)) for file in files)])


def _row(file: FileStatus, columns: int) -> list[object]:
    values = [getattr(file, name) for name in FIELDS]
    plain = [" ".join(value.split()) if isinstance(value, str) and name == "reason" else value
             for name, value in zip(FIELDS, values, strict=True)]  # fmt: skip
    return [*plain, *(file.stains or [None] * columns)]


def check_status_path(path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless `path` names a CSV file."""
    if Path(path).suffix.lower() != ".csv":
        raise ValueError(f"the table of statuses is {str(path)!r}; expected a name that ends in .csv.")
