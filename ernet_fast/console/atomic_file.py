"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

_TEMPORARY = re.compile(r"\..*\.\d+\.\d+\.tmp")
_NAME_SHOWN = 40  # characters; with the rest of the name below what file systems allow


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends, and never does when the block fails.

    The bytes reach the disk (fsync) in a temporary file of the same folder, which is then renamed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:_NAME_SHOWN]}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with _open_locked(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # before the lock ends
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # not every system can open a folder
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # brings the renaming itself to the disk
        finally:
            os.close(descriptor)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file atomically; file names that are not UTF-8 come out as the bytes they are."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write plain values atomically; raises ValueError for NaN and infinity, which JSON has not."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_csv(path: str | os.PathLike[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write rows atomically, the first of them the header."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def remove_abandoned(folder: str | os.PathLike[str]) -> None:
    """Delete the temporary files in `folder` whose writer was killed; those being written are locked and stay."""
    with os.scandir(folder) as entries:
        found = [entry.path for entry in entries if _TEMPORARY.fullmatch(entry.name)]
    for path in found:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)


def _open_locked(path: Path) -> IO[bytes]:
    """A new file, locked for as long as it is open, so that `remove_abandoned` leaves it alone."""
    while True:
        file = open(path, "wb")
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            return file
        file.close()  # removed as abandoned between its creation and the lock
