"""What was done in an output folder: an append-only file with a checksum a line, for runs that are killed.

A line is `CRC-32 of the rest, hexadecimal` and one JSON object, of three kinds:

    {"begin": NAME}                                a run is going to write this output
    {"done": NAME, "input": ..., "key": ..., ...}  it did, or could not
    {"fit": FOLDER, "key": ..., "stains": [...]}   the stains of all images of a folder

A line that is cut short, or damaged, is as if it were not there: its file is done again. An output that exists is taken
for one of ours if it was begun, and for finished if it was done; any other file is left alone.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

from ernet_fast.console.atomic_file import atomic_write, sync_folder
from ernet_fast.scale.inputs import Job
from ernet_fast.scale.method import Values
from ernet_fast.scale.status import FileStatus

STEM, SUFFIX = "ernet-fast-normalize", ".journal"
SYNC_SECONDS = 2.0
"""The journal reaches the disk at least so often; a machine that loses its power repeats what came after."""

_FIELDS = tuple(FileStatus.__dataclass_fields__)
_VALUES = itemgetter(*_FIELDS)
_ATTRIBUTES = attrgetter(*_FIELDS)
_STAINS = _FIELDS.index("stains")


@dataclass(frozen=True, slots=True)
class Record:
    """A job that was done.

    Attributes:
        stamp: `Job.stamp` of its input.
        key: what the stains it was taken to have were fitted on; empty where that follows from the settings.
        bytes: of the output; -1 if there is none.
        status: what is to be said about it.
        members: of an archive, the statuses of its images.
    """

    stamp: str
    key: str
    bytes: int
    status: FileStatus
    members: tuple[FileStatus, ...] = ()


@dataclass
class Records:
    """All that the journals of a folder say."""

    begun: set[str] = field(default_factory=set)
    done: dict[str, Record] = field(default_factory=dict)
    fits: dict[str, tuple[str, Values]] = field(default_factory=dict)  # folder -> key, stains

    def take(self, lines: Iterable[dict[str, Any]]) -> None:
        """Read the lines of one journal, in their order."""
        for line in lines:
            if "begin" in line:
                self.begun.add(line["begin"])
                self.done.pop(line["begin"], None)
            elif "done" in line:
                self.done[line["done"]] = _record(line)
            else:
                self.fits[line["fit"]] = (line["key"], tuple(line["stains"]))

    def lines(self) -> Iterator[dict[str, Any]]:
        """The shortest journal that says the same."""
        yield from ({"begin": name} for name in sorted(self.begun - self.done.keys()))
        yield from (_line(name, record) for name, record in sorted(self.done.items()))
        yield from ({"fit": name, "key": key, "stains": stains} for name, (key, stains) in sorted(self.fits.items()))


def _line(name: str, record: Record) -> dict[str, Any]:
    found = zip(_FIELDS, _ATTRIBUTES(record.status), strict=True)
    line = {"done": name, "stamp": record.stamp, "key": record.key, "bytes": record.bytes, **dict(found)}
    return {**line, "members": [_ATTRIBUTES(member) for member in record.members]} if record.members else line


def _record(line: dict[str, Any]) -> Record:
    status = _member(*_VALUES(line))
    members = tuple(_member(*values) for values in line.get("members", ()))
    return Record(line["stamp"], line["key"], line["bytes"], status, members)


def _member(*values: Any) -> FileStatus:
    given = list(values)
    given[_STAINS] = tuple(given[_STAINS])
    return FileStatus(*given)


def journal_of(folder: Path, shard: str = "") -> Path:
    """The journal of the runs that have a folder for themselves, or of a `shard` of one ("2-of-8")."""
    return folder / f"{STEM}{'.' if shard else ''}{shard}{SUFFIX}"


def journals(folder: Path) -> list[Path]:
    """The journals in a folder: first that of runs that had it for themselves, then the later ones of shards."""
    main = journal_of(folder)
    return [path for path in [main, *sorted(folder.glob(f"{STEM}.*{SUFFIX}"))] if path.is_file()]


def read_journals(folder: Path) -> Records:
    """What the journals of a folder say together."""
    records = Records()
    for path in journals(folder):
        own = Records()
        own.take(_lines(path))
        # of several shards' records of one file any will do: those of an input that has changed since are recognised
        records.begun |= own.begun
        records.done.update(own.done)
        records.fits.update(own.fits)
    return records


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for line in file:
            if line[8:9] != b" " or not line.endswith(b"\n"):
                continue
            text = line[9:-1]
            if b"%08x" % zlib.crc32(text) == line[:8]:
                yield json.loads(text)


def _encoded(line: dict[str, Any]) -> bytes:
    text = json.dumps(line, allow_nan=False, separators=(",", ":")).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(text), text)


def merge_journals(folder: Path, records: Records) -> None:
    """One journal in place of several; only for a run that has the folder for itself."""
    others = [path for path in journals(folder) if path != journal_of(folder)]
    if others:
        with atomic_write(journal_of(folder)) as file:
            file.writelines(map(_encoded, records.lines()))
        remove(others)


def remove(paths: Iterable[Path]) -> None:
    """Delete journals."""
    for path in paths:
        path.unlink(missing_ok=True)


class Journal:
    """A journal that is being written; `close` brings it to the disk."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "ab+", buffering=0)
        self.folders: set[Path] = set()  # whose renamed files are to reach the disk before the lines that tell of them
        self.due = time.monotonic() + SYNC_SECONDS
        end = self.file.seek(0, os.SEEK_END)
        if end and os.pread(self.file.fileno(), 1, end - 1) != b"\n":
            self._write(b"\n")  # after a line that was cut short

    def begin(self, jobs: Iterable[Job]) -> None:
        """These outputs are going to be written."""
        self._write(b"".join(_encoded({"begin": job.name}) for job in jobs))
        os.fsync(self.file.fileno())

    def fit(self, folder: str, key: str, stains: Values) -> None:
        """The stains of a folder."""
        self._write(_encoded({"fit": folder, "key": key, "stains": stains}))

    def done(self, job: Job, key: str, status: FileStatus, members: tuple[FileStatus, ...] = ()) -> None:
        """A job has this status, and the images of an archive have these."""
        size = -1
        if status.output is not None:
            size = os.stat(job.output).st_size
            self.folders.add(job.output.parent)
        self._write(_encoded(_line(job.name, Record(job.stamp, key, size, status, members))))
        if time.monotonic() >= self.due:
            self.sync()

    def sync(self) -> None:
        """Bring everything said so far to the disk."""
        for folder in self.folders:
            sync_folder(folder)
        self.folders.clear()
        os.fsync(self.file.fileno())
        self.due = time.monotonic() + SYNC_SECONDS

    def close(self) -> None:
        """Bring everything to the disk and end."""
        try:
            self.sync()
        finally:
            self.file.close()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self.file.write(view) :]
