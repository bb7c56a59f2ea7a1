"""Normalising files: reading, writing, and what became of each."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from ernet_fast._optional import require
from ernet_fast.cli.normalize_plan import Job, Outcome
from ernet_fast.console.atomic_file import atomic_write
from ernet_fast.data import ImageReadError, read_image
from ernet_fast.stain import MacenkoNormalizer, MacenkoStatus, macenko_normalize

_JPEG: tuple[str, dict[str, Any]] = ("JPEG", {"quality": 95, "subsampling": 0})
_TIFF: tuple[str, dict[str, Any]] = ("TIFF", {"compression": "tiff_lzw"})
_ENCODING = {".png": ("PNG", {}), ".jpg": _JPEG, ".jpeg": _JPEG, ".tif": _TIFF, ".tiff": _TIFF}
_Result = TypeVar("_Result")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Reasons why no further file could be written either."""


def normalize_files(
    jobs: Iterable[Job],
    normalizer: MacenkoNormalizer,
    *,
    overwrite: bool,
    workers: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Do all jobs, `workers` at a time; a job that fails says so in its outcome and harms no other.

    An output appears complete or not at all. Errors that end everything (a full disk, a missing package) are raised.
    """
    require("PIL.Image", extra="train", purpose="reading and writing images")
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))

    def work(job: Job) -> Outcome:
        image = read(job, overwrite)
        if isinstance(image, Outcome):
            return image
        (result,), statuses = normalize([image], normalizer)
        return finish(job, result, MacenkoStatus(int(statuses[0])), normalizer.on_degenerate)

    outcomes: list[Outcome] = []
    pool = ThreadPoolExecutor(workers)
    try:
        for _, outcome in completed(pool, work, jobs, 2 * workers):
            outcomes.append(outcome)
            advance()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    return outcomes


def completed(
    pool: ThreadPoolExecutor, work: Callable[[Job], _Result], jobs: Iterable[Job], ahead: int
) -> Iterator[tuple[Job, _Result]]:
    """Jobs and what `work` makes of them in `pool`, as they are done, `ahead` of them at a time."""
    waiting = iter(jobs)
    running: dict[Future[_Result], Job] = {pool.submit(work, job): job for job in islice(waiting, ahead)}
    while running:
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            yield running.pop(future), future.result()
        running |= {pool.submit(work, job): job for job in islice(waiting, len(done))}


def read(job: Job, overwrite: bool) -> torch.Tensor | Outcome:
    """The image of a job, uint8 [3, H, W], or why there is nothing to do or to be had."""
    try:
        if not overwrite and job.output.exists():
            return Outcome(str(job.input), str(job.output), "skipped", "the output exists (--overwrite replaces it)")
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
    try:
        _write(job.output, result)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise
        return Outcome(str(job.input), None, "failed", f"{job.output} cannot be written: {_reason(error, job.output)}")
    if status == MacenkoStatus.OK:
        return Outcome(str(job.input), str(job.output), "normalised")
    done = "copied unchanged" if on_degenerate == "identity" else "taken to be stained like the target"
    return Outcome(str(job.input), str(job.output), "degenerate", f"{status.reason}; {done}")


def _write(path: Path, image: torch.Tensor) -> None:
    pil = require("PIL.Image", extra="train", purpose="writing images")
    path.parent.mkdir(parents=True, exist_ok=True)
    kind, options = _ENCODING[path.suffix.lower()]
    encoded = BytesIO()  # Pillow writes TIFF to the descriptor of a file, past its buffer
    pil.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(encoded, format=kind, **options)
    with atomic_write(path) as file:
        file.write(encoded.getbuffer())


def _reason(error: Exception, path: Path) -> str:
    """One line: the error without the file name it begins with."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.removeprefix(f"{path}: ").splitlines() or [type(error).__name__])[0]
