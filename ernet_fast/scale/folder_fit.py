"""Stains of folders and slides: all images of one are fitted together."""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ernet_fast.data import ImageReadError
from ernet_fast.scale import treat
from ernet_fast.scale.inputs import Job
from ernet_fast.scale.pipeline import Work


def folder_of(job: Job) -> str:
    """The folder of a job, as its output's is named; "." for the output folder itself."""
    return job.name.rpartition("/")[0] or "."


@dataclass(frozen=True)
class Grouping:
    """Which images have their stains fitted together.

    Attributes:
        pattern: tells the slide of an image from its path below the base folder: its first group, or all that it
            matches, wherever that is found. None: images of one folder are of one slide.
    """

    pattern: re.Pattern[str] | None = None

    def __call__(self, job: Job) -> str:
        """The name of the job's slide or folder. ValueError if the pattern finds none."""
        if self.pattern is None:
            return folder_of(job)
        found = self.pattern.search(job.name)
        name = found and found[min(1, self.pattern.groups)]
        if not name:
            raise ValueError(f"the slide pattern {self.pattern.pattern!r} finds no slide in the name {job.name!r}.")
        return name


def grouping(fit: str, slide_pattern: str | None) -> Grouping:
    """How "per-folder" and "per-slide" group images. ValueError for a pattern that makes no sense."""
    if (fit == "per-slide") != (slide_pattern is not None):
        raise ValueError(
            f"fit={fit!r} with slide_pattern={slide_pattern!r} (--slide-pattern); 'per-slide' finds the slides of "
            "images in their names by a pattern, and only it."
        )
    try:
        return Grouping(None if slide_pattern is None else re.compile(slide_pattern))
    except re.error as error:
        raise ValueError(f"slide_pattern={slide_pattern!r} is no regular expression: {error}.") from None


def groups(jobs: Iterable[Job], grouping: Grouping) -> dict[str, list[Job]]:
    """The jobs of every folder or slide, both in order, without archives, which are folders of their own."""
    found: dict[str, list[Job]] = {}
    for job in jobs:
        if not job.is_archive:
            found.setdefault(grouping(job), []).append(job)
    return found


def check_groups(jobs: Iterable[Job], grouping: Grouping) -> None:
    """Raise ValueError for jobs whose slide is not told."""
    if grouping.pattern is not None:
        for job in jobs:
            if job.is_archive:
                raise ValueError(f"{str(job.input)!r} is an archive, which counts as a folder: use fit='per-folder'.")
            grouping(job)


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
