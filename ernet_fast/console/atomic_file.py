"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from ernet_fast.console.file_locks import fcntl

_TEMPORARY = re.compile(r"\..*\.\d+\.\d+\.tmp")
_NAME_SHOWN = 40  # characters; with the rest of the name below what file systems allow


class PendingFile:
    """A binary file, open as `file`, that takes the place of `path` with `commit`, from whichever thread.

    Until then its bytes are in a temporary file of the same folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        # a random number: processes on several machines, or in containers, may have one number
        name = f".{self.path.name[:_NAME_SHOWN]}.{os.getpid()}.{secrets.randbits(60)}.tmp"
        self.temporary = self.path.with_name(name)
        self.file = _open_locked(self.temporary)

    def commit(self) -> None:
        """Bring the bytes to the disk (fsync), then rename; on an error the temporary file is gone."""
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            os.replace(self.temporary, self.path)  # before the lock ends
            self.file.close()
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove the temporary file."""
        with contextlib.suppress(OSError):  # what is in the buffer may find no room
            self.file.close()
        self.temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends, and never does when the block fails.

    The bytes, and then the renaming, reach the disk (fsync).
    """
    pending = PendingFile(path)
    try:
        yield pending.file
    except BaseException:
        pending.discard()
        raise
    pending.commit()
    sync_folder(pending.path.parent)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Bring what was renamed in a folder to the disk, where the system can open folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file atomically; file names that are not UTF-8 come out as the bytes they are."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write plain values atomically; raises ValueError for NaN and infinity, which JSON has not."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_json_first(path: str | os.PathLike[str], value: Any) -> bool:
    """As `write_json`, unless there is a file already: then nothing is written, and the result is False."""
    pending = PendingFile(path)
    try:
        pending.file.write((json.dumps(value, indent=1, allow_nan=False) + "\n").encode("utf-8", "surrogateescape"))
        pending.file.flush()
        os.fsync(pending.file.fileno())
        os.link(pending.temporary, pending.path)  # unlike a renaming, it replaces nothing
    except FileExistsError:
        return False
    finally:
        pending.discard()
    sync_folder(pending.path.parent)
    return True


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
