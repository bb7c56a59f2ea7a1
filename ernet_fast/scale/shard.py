"""One archive on several machines: each does the files whose names fall to it."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernet_fast.console.atomic_file import write_csv
from ernet_fast.scale.status import check_status_path, read_parquet, write_parquet

AUTO = "auto"


@dataclass(frozen=True)
class Shard:
    """Number `index` (from 1) of `count`."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"

    def takes(self, name: str) -> bool:
        """Whether the file or folder of this name falls to this shard: by the name alone, on every machine alike."""
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.index - 1


def read_shard(text: str, environment: Mapping[str, str] = os.environ) -> Shard:
    """The shard "I/N", or that which the environment of a cluster's job says ("auto").

    "auto" looks at SLURM_ARRAY_TASK_ID (with _COUNT, _MIN and _STEP of the array), at RANK and WORLD_SIZE (torchrun),
    and at SLURM_PROCID and SLURM_NTASKS (srun), in this order.

    Raises:
        ValueError: no such shard, or nothing in the environment.
    """
    if text == AUTO:
        return _from_environment(environment)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"shard {text!r} (--shard); expected I/N with 1 <= I <= N, e.g. 2/8, or 'auto'.")
    return Shard(int(match[1]), int(match[2]))


def _from_environment(environment: Mapping[str, str]) -> Shard:
    def number(name: str, default: int | None = None) -> int:
        try:
            return int(environment[name]) if default is None else int(environment.get(name, default))
        except (KeyError, ValueError):
            raise ValueError(
                f"--shard auto: {name} is {environment.get(name)!r}, where a number is needed; give --shard I/N."
            ) from None

    if "SLURM_ARRAY_TASK_ID" in environment:
        first, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1)
        index, count = (number("SLURM_ARRAY_TASK_ID") - first) // max(1, step), number("SLURM_ARRAY_TASK_COUNT")
    elif "RANK" in environment:
        index, count = number("RANK"), number("WORLD_SIZE")
    elif "SLURM_PROCID" in environment:
        index, count = number("SLURM_PROCID"), number("SLURM_NTASKS")
    else:
        raise ValueError(
            "--shard auto finds no SLURM_ARRAY_TASK_ID, RANK or SLURM_PROCID in the environment; give --shard I/N."
        )
    if not 0 <= index < count:
        raise ValueError(f"--shard auto: the environment says number {index} (from 0) of {count}; give --shard I/N.")
    return Shard(index + 1, count)


def status_of_shard(path: str | os.PathLike[str], shard: Shard | None) -> Path:
    """The name of the table of a shard: status.csv -> status.2-of-8.csv."""
    path = Path(path)
    return path if shard is None else path.with_name(f"{path.stem}.{shard}{path.suffix}")


def merge_status(tables: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> int:
    """Write the rows of several tables as one, in the order of their inputs; returns their number.

    Of rows for one input the last counts, in the order of `tables`. The tables of all shards give that of a run without
    shards, byte for byte.

    Raises:
        ValueError: a file that is no table of statuses, of another method than the first, or of another kind (CSV,
            Parquet) than the output.
    """
    check_status_path(output)
    suffix = Path(output).suffix.lower()
    rows: dict[str, list[Any]] = {}
    header: list[Any] | None = None
    for table in tables:
        if Path(table).suffix.lower() != suffix:
            raise ValueError(f"{str(table)!r} does not end in {suffix}, as the output does; tables of one kind merge.")
        first, *others = _read(table, suffix) or [[]]
        if first[:1] != ["input"] or any(len(row) != len(first) for row in others):
            raise ValueError(f"{str(table)!r} is no table of statuses.")
        header = header or first
        if first != header:
            raise ValueError(f"{str(table)!r} has other columns than {str(tables[0])!r}; tables of one method merge.")
        rows.update((row[0], row) for row in others)
    if header is None:
        raise ValueError("no tables to merge.")
    merged = [rows[name] for name in sorted(rows)]
    if suffix == ".csv":
        write_csv(output, [header, *merged])
    else:
        write_parquet(output, header, merged)
    return len(rows)


def _read(table: str | os.PathLike[str], suffix: str) -> list[list[Any]]:
    if suffix == ".parquet":
        return read_parquet(table)
    with open(table, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return [*csv.reader(file)]
