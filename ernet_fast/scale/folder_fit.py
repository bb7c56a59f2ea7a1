"""Stains of folders: all images of a folder are taken as one slide."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np

from ernet_fast.data import ImageReadError
from ernet_fast.scale import treat
from ernet_fast.scale.inputs import Job
from ernet_fast.scale.pipeline import Work


def folder_of(job: Job) -> str:
    """The folder of a job, as its output's is named; "." for the output folder itself."""
    return job.name.rpartition("/")[0] or "."


def folders(jobs: Iterable[Job]) -> dict[str, list[Job]]:
    """The jobs of every folder, both in order, without archives, which are folders of their own."""
    found: dict[str, list[Job]] = {}
    for job in jobs:
        if not job.is_archive:
            found.setdefault(folder_of(job), []).append(job)
    return found


def fingerprint(jobs: Iterable[Job]) -> str:
    """Equal for the same inputs: their names, and their checksums or sizes and times of change."""
    lines = sorted(f"{job.name}\0{job.sha256 or job.stamp}\n" for job in jobs)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def images_of(jobs: Iterable[Job], work: Work) -> Iterator[np.ndarray]:
    """The images of the jobs in their order, decoded by threads; those that cannot be read are left out."""

    def read(job: Job) -> np.ndarray | None:
        try:
            return treat.open_picture(treat.load(job, work.limits), work.limits).pixels
        except (ImageReadError, OSError):
            return None  # said again when the job is done

    following, ahead = iter(jobs), work.workers + 1  # in order, so that sums of floating-point numbers are
    with ThreadPoolExecutor(work.workers) as pool:
        running = deque(pool.submit(read, job) for job in islice(following, ahead))
        try:
            while running:
                pixels = running.popleft().result()
                running.extend(pool.submit(read, job) for job in islice(following, 1))
                if pixels is not None:
                    yield pixels
        finally:
            pool.shutdown(cancel_futures=True)
