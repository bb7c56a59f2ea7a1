"""The folder of a run: the names in it, and one run at a time that writes to it."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ernet_fast.console.atomic_file import remove_abandoned
from ernet_fast.console.file_locks import fcntl

LAST, BEST = "last.pt", "best.pt"
_LOCK = ".lock"
_held: set[str] = set()  # by this process: POSIX locks exclude other processes only


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The checkpoint at `path`; of the folder of a run, the best one, or FileNotFoundError."""
    path = Path(path)
    if not path.is_dir():
        return path
    if not (path / BEST).is_file():
        hint = f"; its {LAST} is of a run without a complete epoch" if (path / LAST).is_file() else ""
        raise FileNotFoundError(f"no {BEST} in the folder {str(path)!r}{hint}.")
    return path / BEST


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Make `folder` and keep other runs out of it; temporary files that killed runs left in it are removed.

    Raises RuntimeError if another run is writing to it, and names its process.
    """
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _LOCK
    key = os.path.realpath(path)
    if key in _held:
        raise RuntimeError(f"this process is training into {str(folder)!r} already.")
    file = _locked(path)
    _held.add(key)
    try:
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        remove_abandoned(folder)
        yield
    finally:
        _held.discard(key)
        path.unlink(missing_ok=True)
        file.close()
        if created:
            with contextlib.suppress(OSError):  # not empty: the run has begun
                folder.rmdir()


def _locked(path: Path) -> IO[str]:
    """The lock file, open, empty and locked. The lock ends with the process, however that ends."""
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read() or "unknown process"
            file.close()
            raise RuntimeError(
                f"another run is writing to {str(path.parent)!r} ({owner}). Wait for it or stop it, or choose another "
                "--out."
            ) from None
        except OSError:  # a file system without locks
            pass
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            return file
        file.close()  # another run ended, and removed this file, between its opening and the lock
