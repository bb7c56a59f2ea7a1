"""Normalising files on a GPU: threads decode and encode while the device works on whole batches."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, repeat
from typing import NamedTuple

import torch

from ernet_fast._optional import require
from ernet_fast.cli.normalize_files import completed, finish, normalize, read
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
