"""The output folder of a run: the record of its settings, and who may write to it."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ernet_fast._version import __version__
from ernet_fast.console.atomic_file import write_json, write_json_first
from ernet_fast.console.file_locks import fcntl
from ernet_fast.scale.inputs import Job, files_below, is_output
from ernet_fast.scale.journal import SUFFIX, journal_of, journals, remove
from ernet_fast.scale.method import Method
from ernet_fast.scale.shard import Shard
from ernet_fast.scale.target import CONSTANTS

NAME = "ernet-fast-normalize.json"
_ADVICE = "Give the same settings, choose another folder, or redo them with --overwrite."
_TO_BE_READ = ("target_image", "source_image")
"""Settings that decide nothing: the numbers beside them do."""


def settings_of(method: Method, target: str, **others: Any) -> dict[str, Any]:
    """Everything that decides the pixels, as plain values: version, method, constants, target and `others`."""
    return {
        "ernet_fast": __version__,
        "method": method.name,
        **{name: getattr(method.options, name) for name in (*CONSTANTS, "on_degenerate")},
        **others,
        "target_image": target,
        "target": method.target_values,
    }


@contextlib.contextmanager
def one_run(folder: Path, *, make: bool = True, shard: Shard | None = None) -> Iterator[None]:
    """Make `folder` if that is asked for, which a run has to itself, or shares with the other shards of as many.

    The locks, on the folder and on the journals of shards, end with the process, however that ends.

    Raises:
        FileNotFoundError: no such folder, and none is to be made.
        RuntimeError: the folder, or the shard, is in use.
    """
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        whole = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        raise FileNotFoundError(f"no output folder {str(folder)!r}.") from None
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, whole)
        _lock(whole, fcntl.LOCK_EX if shard is None else fcntl.LOCK_SH, folder)
        if shard is not None:
            own = os.open(journal_of(folder, str(shard)), os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, own)
            _lock(own, fcntl.LOCK_EX, folder)
            _refuse_other_counts(folder, shard)
        yield


def _lock(descriptor: int, kind: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_NB | kind)
    except BlockingIOError:
        raise RuntimeError(
            f"another run is writing to {str(folder)!r}. Wait for it or stop it, or choose another folder; several at "
            "once take --shard I/N."
        ) from None
    except OSError:  # a file system without locks
        warnings.warn(
            f"the file system of {str(folder)!r} has no locks: see to it that no two runs do the same there.",
            stacklevel=3,
        )


def _refuse_other_counts(folder: Path, shard: Shard) -> None:
    """RuntimeError if a shard of another number of shards is being worked on: both would write some of the files."""
    for path in journals(folder):
        if not path.name.endswith(f"-of-{shard.count}{SUFFIX}"):
            with open(path, "rb") as file:
                _lock(file.fileno(), fcntl.LOCK_SH, folder)


def differences(found: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """What `settings` change, one phrase each."""
    changed = [name for name in settings if name not in _TO_BE_READ and found.get(name) != settings[name]]
    shown = {name: f"{name}_image" if name in ("target", "source") else name for name in changed}
    return [f"{name} was {found.get(key)!r}, now {settings.get(key)!r}" for name, key in shown.items()]


def claim(folder: Path, jobs: list[Job], settings: dict[str, Any], *, overwrite: bool, shared: bool = False) -> None:
    """Record that the images in `folder` have these settings, so that none of other settings passes for one of them.

    With `overwrite`, outputs of other settings are removed before anything is recorded: a run that is interrupted then
    leaves images of one kind only. A folder that is `shared` keeps the journals of the others.

    Raises:
        ValueError: images of other or unknown settings are among the outputs (without `overwrite`) or beside them.
    """
    path = folder / NAME
    found = read_settings(folder)
    changes = None if found is None else differences(found, settings)
    if changes == []:
        return
    existing = [job.output for job in jobs if job.output.exists()]
    if changes is None and existing and not overwrite:
        raise ValueError(
            f"{len(existing)} of the images to be written are in {str(folder)!r} already (e.g. {existing[0].name}), "
            f"and nothing says with which settings they were made. {_ADVICE}"
        )
    if changes and not overwrite:
        refuse_other_settings(folder, settings)
    if changes:
        outputs = {job.output for job in jobs}
        others = [path for path in files_below(folder) if is_output(path.name) and path not in outputs]
        if others:
            raise ValueError(
                f"{len(others)} images in {str(folder)!r} have other settings and would not be redone (e.g. "
                f"{others[0].name}): {'; '.join(changes)}. Choose another folder."
            )
    for output in existing:
        with contextlib.suppress(OSError):  # writing it will say why
            output.unlink()
    if not shared:
        remove(journals(folder))  # after what they tell of
    folder.mkdir(parents=True, exist_ok=True)
    if found is not None:
        write_json(path, settings)
        return
    if not write_json_first(path, settings):  # another run was faster: its settings count
        claim(folder, jobs, settings, overwrite=overwrite, shared=shared)


def refuse_other_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError unless the images in `folder` have these settings."""
    found = read_settings(folder)
    if found is None:
        raise ValueError(f"no {NAME} in {str(folder)!r} says with which settings its images were made.")
    if changes := differences(found, settings):
        raise ValueError(f"the images in {str(folder)!r} have other settings: {'; '.join(changes)}. {_ADVICE}")


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings recorded in a folder; None if there are none, empty if they are damaged."""
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}
