"""Normalising files: what goes where, and what became of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ernet_fast._optional import require
from ernet_fast.console.atomic_file import atomic_write
from ernet_fast.data import ImageReadError, read_image
from ernet_fast.stain import MacenkoNormalizer, MacenkoStatus, macenko_normalize

READABLE = (".png", ".jpg", ".jpeg")
_OTHER_PICTURES = (".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", ".svs", ".ndpi", ".mrxs")
_JPEG_QUALITY = 95


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


def plan(source: Path, folder: Path, *, as_png: bool = False) -> tuple[list[Job], list[Outcome]]:
    """What is to be written where, and the pictures that cannot be read.

    Raises:
        FileNotFoundError: no such input.
        NotADirectoryError: the output is a file.
        ValueError: an output would take the place of an input, two outputs have one name, or there is no image.
    """
    if not source.exists():
        raise FileNotFoundError(f"no file or folder {str(source)!r}.")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{str(folder)!r} is a file; expected a folder to write to.")
    base = source if source.is_dir() else source.parent
    if source.is_dir() and _is_within(folder, source):
        raise ValueError(
            f"the output folder {str(folder)!r} is the input folder or lies in it; choose one outside of "
            f"{str(source)!r}."
        )
    inputs, ignored = [], []
    for path in _files(source):
        if path.is_dir():
            ignored.append(Outcome(str(path), None, "skipped", "a link to a folder; links are not followed"))
        elif path.suffix.lower() in READABLE:
            inputs.append(path)
        elif path.suffix.lower() in _OTHER_PICTURES or path == source:
            ignored.append(
                Outcome(str(path), None, "skipped", f"{path.suffix or 'no suffix'}: only PNG and JPEG are read")
            )
    if not inputs:
        raise ValueError(f"no PNG or JPEG image in {str(source)!r}.")
    jobs = [Job(path, _renamed(folder / path.relative_to(base), as_png)) for path in inputs]
    _check_outputs(jobs)
    return jobs, ignored


def _files(source: Path) -> Iterator[Path]:
    """The files, and links to folders, below `source` in the order of their names; hidden ones are left out."""
    if source.is_file():
        yield source
        return
    for folder, children, names in os.walk(source, onerror=_raise):
        children[:] = sorted(name for name in children if not name.startswith("."))
        links = [name for name in children if os.path.islink(os.path.join(folder, name))]
        yield from (Path(folder) / name for name in sorted([*names, *links]) if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def _is_within(folder: Path, above: Path) -> bool:
    return (
        os.path.realpath(folder) == os.path.realpath(above)
        or Path(os.path.realpath(above)) in Path(os.path.realpath(folder)).parents
    )


def _renamed(path: Path, as_png: bool) -> Path:
    return path.with_suffix(".png") if as_png else path


def _check_outputs(jobs: list[Job]) -> None:
    """No output may be an input, under whatever name, and no two outputs the same file."""
    inputs = {_identity(job.input): job.input for job in jobs}
    taken: dict[str, Path] = {}
    for job in jobs:
        clash = inputs.get(_identity(job.output)) or inputs.get(os.path.realpath(job.output))
        if clash is not None:
            raise ValueError(
                f"{str(job.output)!r} would overwrite the input {str(clash)!r}; choose another output folder."
            )
        other = taken.setdefault(os.path.realpath(job.output), job.input)
        if other != job.input:
            raise ValueError(
                f"{str(other)!r} and {str(job.input)!r} would both be written to {str(job.output)!r}; use --format "
                "keep."
            )


def _identity(path: Path) -> str:
    """Equal for two names of one file, hard links included."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return os.path.realpath(path)
    return f"{found.st_dev}:{found.st_ino}"


def normalize_files(
    jobs: Iterable[Job],
    normalizer: MacenkoNormalizer,
    *,
    overwrite: bool,
    workers: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Do all jobs, `workers` at a time; a job that fails says so in its outcome and harms no other.

    An output appears complete or not at all. Errors of the whole (a full disk, a missing package) are raised.
    """
    require("PIL.Image", extra="train", purpose="reading and writing images")
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    waiting = iter(jobs)
    outcomes: list[Outcome] = []
    try:
        with ThreadPoolExecutor(workers) as pool:
            running: set[Future[Outcome]] = {
                pool.submit(_do, job, normalizer, overwrite) for job in islice(waiting, 2 * workers)
            }
            try:
                while running:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        outcomes.append(future.result())
                        advance()
                    running |= {pool.submit(_do, job, normalizer, overwrite) for job in islice(waiting, len(done))}
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)
    return outcomes


def _do(job: Job, normalizer: MacenkoNormalizer, overwrite: bool) -> Outcome:
    image = read(job, overwrite)
    if isinstance(image, Outcome):
        return image
    (result,), statuses = normalize([image], normalizer)
    return finish(job, result, MacenkoStatus(int(statuses[0])), normalizer.on_degenerate)


def read(job: Job, overwrite: bool) -> torch.Tensor | Outcome:
    """The image of a job, uint8 [3, H, W], or why there is nothing to do or to be had."""
    if job.output.exists() and not overwrite:
        return Outcome(str(job.input), str(job.output), "skipped", "the output exists (--overwrite replaces it)")
    try:
        return read_image(job.input)
    except (ImageReadError, OSError) as error:
        return Outcome(str(job.input), None, "failed", _reason(error, job.input))


def normalize(images: list[torch.Tensor], normalizer: MacenkoNormalizer) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Normalised images and the status of each; no policy raises."""
    return macenko_normalize(
        images,
        normalizer.target,
        Io=normalizer.Io,
        alpha=normalizer.alpha,
        beta=normalizer.beta,
        percentile=normalizer.percentile,
        on_degenerate="identity" if normalizer.on_degenerate == "raise" else normalizer.on_degenerate,
        layout="CHW",
        return_status=True,
    )


def finish(job: Job, result: torch.Tensor, status: MacenkoStatus, on_degenerate: str) -> Outcome:
    """Write a normalised image, uint8 [3, H, W] on the CPU, unless its status and the policy say that it failed."""
    if status != MacenkoStatus.OK and on_degenerate == "raise":
        return Outcome(str(job.input), None, "failed", status.reason)
    _write(job.output, result)
    if status == MacenkoStatus.OK:
        return Outcome(str(job.input), str(job.output), "normalised")
    done = "copied unchanged" if on_degenerate == "identity" else "taken to be stained like the target"
    return Outcome(str(job.input), str(job.output), "degenerate", f"{status.reason}; {done}")


def _write(path: Path, image: torch.Tensor) -> None:
    pil = require("PIL.Image", extra="train", purpose="writing images")
    path.parent.mkdir(parents=True, exist_ok=True)
    jpeg = path.suffix.lower() in (".jpg", ".jpeg")
    options: dict[str, Any] = {"quality": _JPEG_QUALITY, "subsampling": 0} if jpeg else {}
    with atomic_write(path) as file:
        pil.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(
            file, format="JPEG" if jpeg else "PNG", **options
        )


def _reason(error: Exception, path: Path) -> str:
    """The error without the file name it begins with."""
    return str(error).removeprefix(f"{path}: ").splitlines()[0]
