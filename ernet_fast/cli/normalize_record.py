"""The record of the settings that the images of a folder were normalised with."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ernet_fast._version import __version__
from ernet_fast.cli.normalize_plan import Job, files_below
from ernet_fast.console.atomic_file import write_json
from ernet_fast.data.layout import IMAGE_SUFFIXES
from ernet_fast.stain import MacenkoNormalizer

NAME = "ernet-fast-normalize.json"
METHOD = ("Io", "alpha", "beta", "percentile", "on_degenerate")
"""Attributes of the normaliser that decide the pixels, beside its target; options of the command."""
_ADVICE = "Give the same settings, choose another folder, or redo them with --overwrite."


def settings_of(normalizer: MacenkoNormalizer, target: str | None) -> dict[str, Any]:
    """Everything that decides the pixels: method and target, as plain values. `target_image` is there to be read."""
    return {
        "ernet_fast": __version__,
        **{name: getattr(normalizer, name) for name in METHOD},
        "target_image": "published" if target is None else target,
        "target": {"HERef": normalizer.HERef.tolist(), "maxCRef": normalizer.maxCRef.tolist()},
    }


@contextlib.contextmanager
def one_run_overwrites(folder: Path, *, overwrite: bool) -> Iterator[None]:
    """Make `folder`, which a run with `overwrite` has to itself and others may share; RuntimeError if it is in use.

    The lock, on the folder, ends with the process, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_NB | (fcntl.LOCK_EX if overwrite else fcntl.LOCK_SH))
            except BlockingIOError:
                raise RuntimeError(
                    f"another run is writing to {str(folder)!r}, and one of the two has --overwrite. Wait for it or "
                    "stop it, or choose another folder."
                ) from None
        yield
    finally:
        os.close(descriptor)


def claim(folder: Path, jobs: list[Job], settings: dict[str, Any], *, overwrite: bool) -> None:
    """Record that the images in `folder` have these settings, so that none of other settings passes for one of them.

    With `overwrite`, outputs of other settings are removed before anything is recorded: a run that is interrupted then
    leaves images of one kind only. Raises ValueError if images of other or unknown settings are among the outputs
    (without `overwrite`) or beside them.
    """
    path = folder / NAME
    found = _read(path)
    changes = None
    if found is not None:
        changed = [name for name in settings if name != "target_image" and found.get(name) != settings[name]]
        shown = {name: "target_image" if name == "target" else name for name in changed}
        changes = [f"{name} was {found.get(key)!r}, now {settings[key]!r}" for name, key in shown.items()]
    if changes == []:
        return
    existing = [job.output for job in jobs if job.output.exists()]
    if changes is None and existing and not overwrite:
        raise ValueError(
            f"{len(existing)} of the images to be written are in {str(folder)!r} already (e.g. {existing[0].name}), "
            f"and nothing says with which settings they were made. {_ADVICE}"
        )
    if changes and not overwrite:
        raise ValueError(f"the images in {str(folder)!r} have other settings: {'; '.join(changes)}. {_ADVICE}")
    if changes:
        outputs = {job.output for job in jobs}
        others = [p for p in files_below(folder) if p.suffix.lower() in IMAGE_SUFFIXES and p not in outputs]
        if others:
            raise ValueError(
                f"{len(others)} images in {str(folder)!r} have other settings and would not be redone (e.g. "
                f"{others[0].name}): {'; '.join(changes)}. Choose another folder."
            )
    for output in existing:
        with contextlib.suppress(OSError):  # writing it will say why
            output.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    if found is not None:
        write_json(path, settings)
        return
    try:
        with open(path, "x", encoding="utf-8") as file:
            json.dump(settings, file, indent=1)
            file.write("\n")
    except FileExistsError:  # another run was faster: its settings count
        claim(folder, jobs, settings, overwrite=overwrite)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}
