"""Normalising files one by one, or on a GPU in batches: reading, writing, and what became of each."""

from __future__ import annotations

import errno
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import count, islice, repeat
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import torch

from ernet_fast._optional import require
from ernet_fast.cli.normalize_plan import Job, Outcome
from ernet_fast.console.atomic_file import atomic_write
from ernet_fast.data import ImageReadError, Prefetcher
from ernet_fast.data.image_io import read_pixels
from ernet_fast.data.prefetch import to_host
from ernet_fast.stain import MacenkoNormalizer, MacenkoStatus, macenko_normalize

BATCH_PIXELS = 1 << 24
"""A batch is full with about this many pixels: 48 MiB of 8-bit images."""

UNWRITTEN = 2
"""Batches that may wait to be encoded; beyond, the device waits for the threads."""

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
        del image  # writing takes as much again
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
            job = running.pop(future)
            running |= {pool.submit(work, another): another for another in islice(waiting, 1)}
            yield job, future.result()


class _Batch(NamedTuple):
    jobs: list[Job]
    images: list[torch.Tensor]


def normalize_batches(
    jobs: Iterable[Job],
    normalizer: MacenkoNormalizer,
    *,
    overwrite: bool,
    workers: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """As `normalize_files`, with the same outcomes and pixels, in batches on the device of `normalizer`.

    `workers` threads read images ahead and write results; one uploads a batch while the device works on another.
    """
    require("PIL.Image", extra="train", purpose="reading and writing images")
    outcomes: list[Outcome] = []
    unread: queue.SimpleQueue[Outcome] = queue.SimpleQueue()  # skipped or failed before there was an image
    unwritten: deque[list[Future[Outcome]]] = deque()

    def collect(futures: Iterable[Future[Outcome]] = ()) -> None:
        for future in futures:
            outcomes.append(future.result())
            advance()
        while not unread.empty():
            outcomes.append(unread.get())
            advance()

    with ThreadPoolExecutor(workers) as pool:
        batches = iter(Prefetcher(_decoded(jobs, pool, 4 * workers, overwrite, unread), normalizer.HERef.device))
        try:
            for batch in batches:
                unwritten.append(_begin(batch, normalizer, pool))
                collect()
                while len(unwritten) > UNWRITTEN:
                    collect(unwritten.popleft())
            for futures in unwritten:
                collect(futures)
        except BaseException:
            batches.close()  # type: ignore[attr-defined]
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    collect()
    return outcomes


def _decoded(
    jobs: Iterable[Job], pool: ThreadPoolExecutor, ahead: int, overwrite: bool, unread: queue.SimpleQueue[Outcome]
) -> Iterator[_Batch]:
    """Batches of images, read by `pool`, `ahead` at a time; outcomes of the other jobs go to `unread`."""
    batch, pixels = _Batch([], []), 0
    for job, image in completed(pool, lambda job: read(job, overwrite), jobs, ahead):
        if isinstance(image, Outcome):
            unread.put(image)
            continue
        batch.jobs.append(job)
        batch.images.append(image)
        pixels += image.shape[1] * image.shape[2]
        if pixels >= BATCH_PIXELS:
            yield batch
            batch, pixels = _Batch([], []), 0
    if batch.jobs:
        yield batch


def _begin(batch: _Batch, normalizer: MacenkoNormalizer, pool: ThreadPoolExecutor) -> list[Future[Outcome]]:
    """Queue the work on a batch and the writing of its results."""
    results, statuses = normalize(batch.images, normalizer)
    (on_host, *images), copied = to_host([statuses, *results])

    def write(job: Job, image: torch.Tensor, number: int) -> Outcome:
        if copied is not None:
            copied.synchronize()
        return finish(job, image, MacenkoStatus(int(on_host[number])), normalizer.on_degenerate)

    return list(map(pool.submit, repeat(write), batch.jobs, images, count()))


def read(job: Job, overwrite: bool) -> torch.Tensor | Outcome:
    """The image of a job, uint8 [3, H, W] with the memory of [H, W, 3], or why there is nothing to do or to be had."""
    try:
        if not overwrite and job.output.exists():
            return Outcome(str(job.input), str(job.output), "skipped", "the output exists (--overwrite replaces it)")
        return torch.from_numpy(read_pixels(job.input)).permute(2, 0, 1)
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
    picture = pil.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    with atomic_write(path) as file:
        picture.save(_WithoutDescriptor(file), format=kind, **options)


class _WithoutDescriptor:
    """A file to which Pillow writes as to any: with a descriptor it goes past the buffer, and tells no full disk."""

    def __init__(self, file: IO[bytes]) -> None:
        self.write, self.flush, self.seek, self.tell = file.write, file.flush, file.seek, file.tell


def _reason(error: Exception, path: Path) -> str:
    """One line: the error without the file name it begins with."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.removeprefix(f"{path}: ").splitlines() or [type(error).__name__])[0]
