"""Normalising files: which are read, and where each is written."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ernet_fast.data.layout import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES, is_hidden

READABLE = "PNG, JPEG or TIFF"
_OTHER_PICTURES = (*OTHER_IMAGE_SUFFIXES, ".svs", ".ndpi", ".mrxs")


@dataclass(frozen=True)
class Outcome:
    """What became of a file: ``normalised``, ``degenerate`` (written, but without stains of its own), ``skipped`` or
    ``failed``.
    """

    input: str
    output: str | None
    status: str
    reason: str = ""


@dataclass(frozen=True)
class Job:
    """A file to read and a file to write."""

    input: Path
    output: Path


def is_single(source: Path, output: Path) -> bool:
    """Whether `output` names one file to write rather than a folder: one image in, and an image's name out."""
    return source.is_file() and output.suffix.lower() in IMAGE_SUFFIXES and not output.is_dir()


def plan(source: Path, output: Path, *, as_png: bool = False) -> tuple[list[Job], list[Outcome]]:
    """What is to be written where, and the pictures that cannot be read.

    Raises:
        FileNotFoundError: no such input.
        NotADirectoryError: the output is a file, or has the name of one, where a folder is needed.
        ValueError: an output would take the place of an input, two outputs have one name, or there is no image.
    """
    if not source.exists():
        raise FileNotFoundError(f"no file or folder {str(source)!r}.")
    single = is_single(source, output)
    if not single and (output.suffix.lower() in IMAGE_SUFFIXES or output.exists()) and not output.is_dir():
        raise NotADirectoryError(f"{str(output)!r} is a file or has an image's name; expected a folder to write to.")
    if source.is_dir() and Path(os.path.realpath(output)).is_relative_to(os.path.realpath(source)):
        raise ValueError(
            f"the output folder {str(output)!r} is the input folder or lies in it; choose one outside of "
            f"{str(source)!r}."
        )
    inputs, ignored = _sorted_out(source)
    if not inputs:
        raise ValueError(f"no {READABLE} image in {str(source)!r}.")
    base = source if source.is_dir() else source.parent
    outputs = [output] if single else [output / path.relative_to(base) for path in inputs]
    if as_png and single and output.suffix.lower() != ".png":
        raise ValueError(f"--format png, but the output is {str(output)!r}; drop one of the two.")
    if as_png:
        outputs = [target.with_suffix(".png") for target in outputs]
    jobs = list(map(Job, inputs, outputs))
    _check_outputs(jobs)
    return jobs, ignored


def _sorted_out(source: Path) -> tuple[list[Path], list[Outcome]]:
    """The images to read, and what looks like one and is not read."""
    inputs, ignored = [], []
    for path in files_below(source):
        readable = path.suffix.lower() in IMAGE_SUFFIXES
        reason = _not_a_file(path)
        if reason is None and not readable:
            reason = f"{path.suffix or 'no suffix'}: only {READABLE} is read"
        if reason is None:
            inputs.append(path)
        elif readable or path.suffix.lower() in _OTHER_PICTURES or path.is_dir() or path == source:
            ignored.append(Outcome(str(path), None, "skipped", reason))
    return inputs, ignored


def _not_a_file(path: Path) -> str | None:
    """Why there is nothing to read; None for files and for links that lead nowhere, which fail when they are read."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return None
    if stat.S_ISDIR(mode):
        return "a link to a folder; links are not followed"
    return None if stat.S_ISREG(mode) else "a FIFO, socket or device, not a file"


def files_below(source: Path) -> Iterator[Path]:
    """The files, and links to folders, below `source` in the order of their names; hidden ones are left out."""
    if not source.is_dir():
        yield source
        return

    def fail(error: OSError) -> None:
        raise error

    for folder, children, names in os.walk(source, onerror=fail):
        children[:] = sorted(name for name in children if not is_hidden(name))
        links = [name for name in children if os.path.islink(os.path.join(folder, name))]
        yield from (Path(folder) / name for name in sorted([*names, *links]) if not is_hidden(name))


def _check_outputs(jobs: list[Job]) -> None:
    """No output may be an input, under whatever name, and no two outputs the same file."""
    inputs = {_identity(job.input): job.input for job in jobs}
    taken: dict[str, Path] = {}
    for job in jobs:
        clash = inputs.get(_identity(job.output)) or inputs.get(os.path.realpath(job.output))
        if clash is not None:
            what = f"{str(job.output)!r} would overwrite the input {str(clash)!r}"
            raise ValueError(f"{what}; choose another output folder.")
        other = taken.setdefault(os.path.realpath(job.output), job.input)
        if other != job.input:
            what = f"{str(other)!r} and {str(job.input)!r} would both be written to {str(job.output)!r}"
            raise ValueError(f"{what}; use --format keep.")


def _identity(path: Path) -> str:
    """Equal for two names of one file, hard links included."""
    try:
        found = path.stat()
    except OSError:  # not there, a loop of links, too long a name: reading or writing it will say so
        return os.path.realpath(path)
    return f"{found.st_dev}:{found.st_ino}"
