"""Images in batches on a GPU: threads read and write, one uploads while the device works on another batch."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import torch

from ernet_fast._optional import require
from ernet_fast.data import ImageReadError, Prefetcher
from ernet_fast.data.prefetch import to_host
from ernet_fast.scale import treat
from ernet_fast.scale.inputs import Job
from ernet_fast.scale.method import Values
from ernet_fast.scale.pipeline import Done, Work, commit, write_pending
from ernet_fast.scale.status import FileStatus
from ernet_fast.scale.treat import Picture
from ernet_fast.stain import MacenkoStatus

BATCH_PIXELS = 1 << 24
"""A batch is full with about this many pixels: 48 MiB of 8-bit images."""

UNWRITTEN = 2
"""Batches that may wait to be encoded; beyond, the device waits for the threads."""

_Result = TypeVar("_Result")


@dataclass
class _Batch:
    """Images with one answer to what their stains are known to be."""

    source: Values | None
    jobs: list[Job] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


def normalize_batches(jobs: Iterable[Job], work: Work, device: str | torch.device) -> Done:
    """As `normalize_each`, with the same statuses and pixels, in batches on `device`."""
    require("PIL.Image", extra="train", purpose="reading and writing images")
    unread: queue.SimpleQueue[tuple[Job, FileStatus]] = queue.SimpleQueue()  # failed before there was an image
    unwritten: deque[list[tuple[Job, Future[FileStatus]]]] = deque()
    begun: deque[_Batch] = deque()

    def pixels() -> Iterator[list[torch.Tensor]]:
        for batch in _decoded(jobs, work, pool, unread):
            begun.append(batch)
            yield [torch.from_numpy(picture.pixels) for picture in batch.pictures]

    def collect(written: list[tuple[Job, Future[FileStatus]]]) -> Done:
        yield from ((job, future.result()) for job, future in written)
        while not unread.empty():
            yield unread.get()

    with ThreadPoolExecutor(work.workers) as pool:
        uploaded = iter(Prefetcher(pixels(), device))
        try:
            for images in uploaded:
                unwritten.append(_begin(begun.popleft(), images, work, pool))
                del images
                yield from collect(unwritten.popleft() if len(unwritten) > UNWRITTEN else [])
            for written in unwritten:
                yield from collect(written)
        except BaseException:
            getattr(uploaded, "close", lambda: None)()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    yield from collect([])


def completed(
    pool: ThreadPoolExecutor, function: Callable[[Job], _Result], jobs: Iterable[Job], ahead: int
) -> Iterator[tuple[Job, _Result]]:
    """Jobs and what `function` makes of them in `pool`, as they are done, `ahead` of them at a time."""
    following = iter(jobs)
    running: dict[Future[_Result], Job] = {pool.submit(function, job): job for job in islice(following, ahead)}
    while running:
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            job = running.pop(future)
            running |= {pool.submit(function, another): another for another in islice(following, 1)}
            yield job, future.result()


def _decoded(
    jobs: Iterable[Job], work: Work, pool: ThreadPoolExecutor, unread: queue.SimpleQueue[tuple[Job, FileStatus]]
) -> Iterator[_Batch]:
    """Batches of images, read by `pool`; the statuses of the other jobs go to `unread`."""

    def read(job: Job) -> Picture | FileStatus:
        try:
            return treat.open_picture(treat.load(job, work.limits), work.limits)
        except (ImageReadError, OSError) as error:
            return treat.failed(job, error)

    batch, pixels = _Batch(None), 0
    for job, picture in completed(pool, read, jobs, 4 * work.workers):
        if isinstance(picture, FileStatus):
            unread.put((job, picture))
            continue
        source = work.sources(job)
        if batch.jobs and (pixels >= BATCH_PIXELS or source != batch.source):
            yield batch
            batch, pixels = _Batch(None), 0
        batch.source = source
        batch.jobs.append(job)
        batch.pictures.append(picture)
        pixels += picture.pixels.shape[0] * picture.pixels.shape[1]
    if batch.jobs:
        yield batch


def _begin(
    batch: _Batch, images: list[torch.Tensor], work: Work, pool: ThreadPoolExecutor
) -> list[tuple[Job, Future[FileStatus]]]:
    """Queue the work on a batch and the writing of its results."""
    results, values, statuses = work.method.normalize(images, batch.source)
    (values, statuses, *on_host), copied = to_host([values, statuses, *results])

    def finish(number: int) -> FileStatus:
        if copied is not None:
            copied.synchronize()
        job, picture = batch.jobs[number], batch.pictures[number]
        found = MacenkoStatus(int(statuses[number]))
        known = tuple(values[number].tolist()) if found == MacenkoStatus.OK else ()
        status = treat.judged(job, picture, known, found, work.method)
        if status.status == "error":
            return status
        pending = write_pending(job, on_host[number], picture.form, work.quality)
        return pending if isinstance(pending, FileStatus) else commit(job, *pending, status)

    return [(job, pool.submit(finish, number)) for number, job in enumerate(batch.jobs)]
