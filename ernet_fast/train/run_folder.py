"""The folder of a run: the names in it, and one run at a time that writes to it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from ernet_fast.console.atomic_file import remove_abandoned
from ernet_fast.console.file_locks import fcntl
from ernet_fast.train.checkpoint import load_checkpoint

LAST, BEST, HISTORY = "last.pt", "best.pt", "history.json"
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


def earlier_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints before ``last.pt``, the newest first: last-1.pt, last-2.pt, ..."""
    found = {}
    for path in folder.glob("last-*.pt"):
        if number := re.fullmatch(r"last-(\d+)\.pt", path.name):
            found[int(number[1])] = path
    return [found[number] for number in sorted(found)]


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The newest checkpoint of a run that can be read, its state, and why newer ones cannot.

    Raises:
        FileNotFoundError: there is none.
        ValueError: all are damaged; the error is that of the newest.
    """
    errors: list[ValueError] = []
    for path in (folder / LAST, *earlier_checkpoints(folder)):
        if path.is_file():
            try:
                return path, load_checkpoint(path), [str(error) for error in errors]
            except ValueError as error:
                errors.append(error)
    if errors:
        raise errors[0]
    raise FileNotFoundError(f"nothing to resume: no {LAST} in {str(folder)!r}.")


def take_back(path: Path) -> None:
    """Make an earlier checkpoint ``last.pt`` again, in place of damaged ones, which are removed."""
    for newer in (path.with_name(LAST), *earlier_checkpoints(path.parent)):
        if newer == path:
            break
        if newer.name != LAST:
            newer.unlink()
    os.replace(path, path.with_name(LAST))


def keep_earlier(folder: Path, count: int) -> None:
    """Before a new ``last.pt`` is written: the present one becomes last-1.pt as well, that one last-2.pt, and so on.

    ``last.pt`` is there at every moment. Checkpoints beyond `count` are removed.
    """
    names = [folder / LAST, *(folder / f"last-{k}.pt" for k in range(1, count + 1))]
    for path in earlier_checkpoints(folder):
        if path not in names:
            path.unlink()
    for older, newer in reversed(list(pairwise(names))):
        if not older.is_file():
            continue
        if older.name != LAST:
            os.replace(older, newer)
            continue
        twin = folder / f".{newer.name}.{os.getpid()}.{secrets.randbits(60)}.tmp"
        try:
            os.link(older, twin)
        except OSError:  # a file system without hard links
            shutil.copyfile(older, twin)
        os.replace(twin, newer)


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
