"""Normalising files on a GPU: threads decode and encode while the device works on whole batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import torch

from ernet_fast._optional import require
from ernet_fast.cli.normalize_files import finish, normalize, read
from ernet_fast.cli.normalize_plan import Job, Outcome
from ernet_fast.data import Prefetcher
from ernet_fast.data.prefetch import to_host
from ernet_fast.stain import MacenkoNormalizer, MacenkoStatus

BATCH_PIXELS = 1 << 24
"""A batch is full with about this many pixels: 48 MiB of 8-bit images."""

UNWRITTEN = 2
"""Batches that may wait to be encoded; beyond, the device waits for the threads."""


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

    `workers` threads read and decode images ahead, and encode and write results; one thread uploads. The device gets a
    batch while it works on the one before.
    """
    require("PIL.Image", extra="train", purpose="reading and writing images")
    outcomes: list[Outcome] = []
    unread: deque[Outcome] = deque()  # skipped or failed before there was an image; the reading thread fills it
    unwritten: deque[list[Future[Outcome]]] = deque()

    def collect(found: Iterable[Outcome]) -> None:
        for outcome in found:
            outcomes.append(outcome)
            advance()

    def take_unread() -> Iterator[Outcome]:
        while unread:
            yield unread.popleft()

    with ThreadPoolExecutor(workers) as pool:
        batches = iter(Prefetcher(_decoded(jobs, pool, 4 * workers, overwrite, unread), normalizer.HERef.device))
        try:
            for batch in batches:
                unwritten.append(_begin(batch, normalizer, pool))
                collect(take_unread())
                while len(unwritten) > UNWRITTEN:
                    collect(future.result() for future in unwritten.popleft())
            for futures in unwritten:
                collect(future.result() for future in futures)
        except BaseException:
            batches.close()  # type: ignore[attr-defined]
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    collect(take_unread())
    return outcomes


def _decoded(
    jobs: Iterable[Job], pool: ThreadPoolExecutor, ahead: int, overwrite: bool, unread: deque[Outcome]
) -> Iterator[_Batch]:
    """Batches of images, read by `pool`, `ahead` at a time; outcomes of the other jobs go to `unread`."""
    waiting = iter(jobs)
    running = deque((job, pool.submit(read, job, overwrite)) for job in islice(waiting, ahead))
    batch = _Batch([], [])
    pixels = 0
    while running:
        job, future = running.popleft()
        image = future.result()
        running.extend((job, pool.submit(read, job, overwrite)) for job in islice(waiting, 1))
        if isinstance(image, Outcome):
            unread.append(image)
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
    jobs = batch.jobs

    def write(number: int) -> Outcome:
        if copied is not None:
            copied.synchronize()
        status = MacenkoStatus(int(on_host[number]))
        return finish(jobs[number], images[number], status, normalizer.on_degenerate)

    return [pool.submit(write, number) for number in range(len(jobs))]
