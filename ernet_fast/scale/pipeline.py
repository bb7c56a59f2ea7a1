"""Many images at once: read ahead, decoded, normalised and encoded by a thread a core, brought to the disk behind.

Pillow and the operators release the interpreter's lock, so threads suffice. A file in work costs its bytes while it
waits, and its pixels in one of the threads only: memory does not grow with the number of files.
"""

from __future__ import annotations

import hashlib
import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from ernet_fast._optional import require
from ernet_fast.console.atomic_file import PendingFile
from ernet_fast.data import ImageReadError
from ernet_fast.data.file_form import FileForm
from ernet_fast.scale import treat
from ernet_fast.scale.inputs import Job
from ernet_fast.scale.method import Method, Values
from ernet_fast.scale.status import FileStatus
from ernet_fast.scale.treat import USUAL_LIMITS, Limits

WAITING = 8
"""Threads that wait for disks: they read inputs and sync outputs."""

WAITING_BYTES = 1 << 26
"""Inputs read ahead hold no more together, unless it is one."""


@dataclass(frozen=True)
class Work:
    """How every job is done.

    Attributes:
        method: the method, with its target.
        sources: stains that images are known to have, by the names of jobs; images without are fitted alone.
        limits: what files may hold.
        quality: of JPEG and lossy WebP in place of the source's.
        workers: images in memory at a time.
    """

    method: Method
    sources: Callable[[Job], Values | None] = lambda job: None
    limits: Limits = USUAL_LIMITS
    quality: int | None = None
    workers: int = 1


Done = Iterator[tuple[Job, FileStatus]]


def normalize_each(jobs: Iterable[Job], work: Work) -> Done:
    """Do all jobs; each with its status as it is done, in any order.

    A job that fails says so in its status and harms no other. An output appears complete or not at all. Errors that end
    everything (a full disk, a missing package) are raised.
    """
    require("PIL.Image", extra="train", purpose="reading and writing images")
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // work.workers))
    try:
        with _Stages(work) as stages:
            yield from stages.run(iter(jobs))
    finally:
        torch.set_num_threads(threads)


class _Stages:
    """The threads, and the jobs under way."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.done: queue.SimpleQueue[tuple[Job, FileStatus | BaseException]] = queue.SimpleQueue()
        self.computing, self.waiting = ThreadPoolExecutor(work.workers), ThreadPoolExecutor(WAITING)
        self.stopped = False

    def __enter__(self) -> _Stages:
        return self

    def __exit__(self, *error: Any) -> None:
        self.stopped = True
        self.computing.shutdown()  # first: what is written still hands on to be committed
        self.waiting.shutdown()

    def run(self, jobs: Iterator[Job]) -> Done:
        """Keep the threads busy until there is nothing left."""
        ahead, running, held = 2 * self.work.workers + WAITING, 0, 0
        following = next(jobs, None)
        error: BaseException | None = None
        while running or following is not None:
            while following is not None:
                if running and (running >= ahead or held + following.size > WAITING_BYTES):
                    break
                running, held = running + 1, held + following.size
                self.start(self.waiting, self.read, following)
                following = next(jobs, None)
            job, status = self.done.get()
            running, held = running - 1, held - job.size
            if isinstance(status, BaseException):
                error, following, self.stopped = error or status, None, True
            else:
                yield job, status
        if error is not None:  # after what was done at the same time
            raise error

    def start(self, pool: ThreadPoolExecutor, stage: Callable[..., FileStatus | None], job: Job, *rest: Any) -> None:
        """Run one stage of a job in a pool; a stage that gives a status, or raises, is the job's last."""

        def run() -> None:
            try:
                status: FileStatus | BaseException | None = stage(job, *rest)
            except BaseException as error:
                status = error
            if status is not None:
                self.done.put((job, status))

        try:
            pool.submit(run)
        except RuntimeError as error:  # the pool is shut down: the run ends
            self.done.put((job, error))

    def check_stopped(self) -> None:
        """Let a stage that has not begun not begin, once the run has failed."""
        if self.stopped:
            raise RuntimeError("the run has ended.")

    def read(self, job: Job) -> FileStatus | None:
        """First stage: the bytes of the input."""
        self.check_stopped()
        try:
            data = treat.load(job, self.work.limits)
        except (ImageReadError, OSError) as error:
            return treat.failed(job, error)
        self.start(self.computing, self.compute, job, data)
        return None

    def compute(self, job: Job, data: bytes) -> FileStatus | None:
        """Second stage: from the bytes of the input to those of the output, in a temporary file."""
        self.check_stopped()
        method = self.work.method
        try:
            picture = treat.open_picture(data, self.work.limits)
        except ImageReadError as error:
            return treat.failed(job, error)
        del data
        try:
            result, values, found = treat.normalize(picture, method, self.work.sources(job))
        except (MemoryError, RuntimeError) as error:  # such as an image that is too large for the memory
            return treat.failed(job, error)
        status = treat.judged(job, picture, values, found, method)
        form = picture.form
        del picture  # writing takes as much again
        if status.status == "error":
            return status
        pending = write_pending(job, result, form, self.work.quality)
        if isinstance(pending, FileStatus):
            return pending
        self.start(self.waiting, commit, job, *pending, status)  # last stage: the output reaches the disk
        return None


def write_pending(
    job: Job, result: torch.Tensor, form: FileForm, quality: int | None
) -> tuple[PendingFile, str] | FileStatus:
    """The output in a temporary file, and its checksum if that is known; or why it cannot be written."""
    try:
        pending = open_output(job)
    except OSError as error:
        return treat.unwritten(job, error)
    try:
        digest = treat.write(pending.file, result, job, form, quality)
    except BaseException as error:
        pending.discard()
        if isinstance(error, (OSError, ValueError)):
            return treat.unwritten(job, error)
        raise
    return pending, digest


def open_output(job: Job) -> PendingFile:
    """A temporary file in the folder of the output, which is made if it is missing."""
    try:
        return PendingFile(job.output)
    except FileNotFoundError:
        job.output.parent.mkdir(parents=True, exist_ok=True)
        return PendingFile(job.output)


def commit(job: Job, pending: PendingFile, digest: str, status: FileStatus) -> FileStatus:
    """Give a written output its name; its status with the checksum, which is made here if it is empty."""
    try:
        pending.file.flush()
        digest = digest or digest_of(pending.temporary)
        pending.commit()
    except OSError as error:
        pending.discard()
        return treat.unwritten(job, error)
    return replace(status, sha256=digest)


def digest_of(path: Any) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    """As `hashlib.file_digest`, which Python 3.10 has not."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
