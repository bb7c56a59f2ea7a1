"""What became of every file of a run, and the table of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernet_fast._optional import require
from ernet_fast.console.atomic_file import atomic_write, write_csv

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
    """A table of one row a file: CSV with a header, numbers in full, fields without a value empty; or Parquet.

    Raises:
        ValueError: `path` ends neither in .csv nor in .parquet.
        ImportError: pyarrow is missing, for Parquet.
    """
    check_status_path(path)
    header = (*FIELDS, *columns)
    rows = [_row(file, len(columns)) for file in files]
    if Path(path).suffix.lower() == ".csv":
        write_csv(path, [header, *rows])
    else:
        write_parquet(path, header, rows)


def write_parquet(path: str | os.PathLike[str], header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """The same table as Parquet (pyarrow): text, whole numbers, and float64 columns, null where there is no value."""
    arrow, parquet = _arrow("pyarrow"), _arrow("pyarrow.parquet")
    kinds = {"width": arrow.int64(), "height": arrow.int64(), "tissue_share": arrow.float64()}
    types = [kinds.get(name, arrow.string() if name in FIELDS else arrow.float64()) for name in header]
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in header]
    table = arrow.table(
        [arrow.array([_text(value) for value in column], kind) for column, kind in zip(columns, types, strict=True)],
        names=list(header),
    )
    with atomic_write(path) as file:
        parquet.write_table(table, file)


def read_parquet(path: str | os.PathLike[str]) -> list[list[object]]:
    """The header and the rows of a Parquet table."""
    table = _arrow("pyarrow.parquet").read_table(path)
    columns = [column.to_pylist() for column in table.columns]
    return [list(table.column_names), *(list(row) for row in zip(*columns, strict=True))]


def _arrow(module: str) -> Any:
    return require(module, extra="parquet", purpose="tables in Parquet")


def _text(value: object) -> object:
    """File names that are not UTF-8 as Parquet can hold them."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if isinstance(value, str) else value


def _row(file: FileStatus, columns: int) -> list[object]:
    values = [getattr(file, name) for name in FIELDS]
    plain = [" ".join(value.split()) if isinstance(value, str) and name == "reason" else value
             for name, value in zip(FIELDS, values, strict=True)]  # fmt: skip
    return [*plain, *(file.stains or [None] * columns)]


def check_status_path(path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless `path` names a table that is written; ImportError if its package is missing."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise ValueError(f"the table of statuses is {str(path)!r}; expected a name that ends in .csv or .parquet.")
    if suffix == ".parquet":
        _arrow("pyarrow")
