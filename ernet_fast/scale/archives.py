"""Archives of images (.zip, .tar, .tar.gz, WebDataset shards) into archives of the same members.

An archive is one unit of a run: its output appears when it is whole, and a run that was killed begins it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np

from ernet_fast.data import ImageReadError
from ernet_fast.scale import treat
from ernet_fast.scale.containers import (
    ArchiveError,
    Checked,
    Member,
    TarArchive,
    ZipArchive,
    each_member,
    open_archive,
    reading,
)  # fmt: skip
from ernet_fast.scale.inputs import Job, renamed
from ernet_fast.scale.pipeline import Work, commit, open_output
from ernet_fast.scale.status import FileStatus
from ernet_fast.scale.treat import Limits

SMALL = 1 << 20
"""Members that are no images are held up to this size, to be written in their order; larger ones are copied through."""


def images_of_archive(job: Job, limits: Limits) -> Iterator[np.ndarray]:
    """The images [H, W, 3] in an archive; those that cannot be read are left out."""
    with reading(), open(job.input, "rb") as file:
        source = open_archive(file, job.input.name, "r")
        for member in each_member(source, limits):
            if member.is_image and not member.refused:
                with contextlib.suppress(ImageReadError):
                    yield treat.open_picture(source.open(member).read(), limits).pixels


def normalize_archive(job: Job, work: Work, format: str) -> tuple[FileStatus, tuple[FileStatus, ...]]:
    """Write an archive with its images normalised and everything else as it is.

    Returns the status of the archive, and those of its images and of what was refused. Members that fail, or are
    refused, are not in the output. An archive that is damaged gives no output. Raises errors that end everything.
    """
    try:
        pending = open_output(job)
    except OSError as error:
        return treat.unwritten(job, error), ()
    try:
        with reading():
            file = open(job.input, "rb")
        with file, ThreadPoolExecutor(work.workers) as pool:
            members = tuple(_Copy(job, work, format, pool).run(file, pending.file))
    except BaseException as error:
        pending.discard()
        if isinstance(error, ArchiveError):
            return treat.failed(job, error), ()
        if isinstance(error, OSError):
            return treat.unwritten(job, error), ()
        raise
    if not members:
        pending.discard()
        return FileStatus(str(job.input), None, "skipped", "no image in the archive"), ()
    return commit(job, pending, "", FileStatus(str(job.input), str(job.output), "ok")), members


class _Copy:
    """The copying of an archive: images are worked on by the pool, and written in the order of the members."""

    def __init__(self, job: Job, work: Work, format: str, pool: ThreadPoolExecutor) -> None:
        self.job, self.work, self.format, self.pool = job, work, format, pool
        self.waiting: deque[tuple[str, Member, Future[tuple[bytes | None, FileStatus]] | bytes]] = deque()
        self.statuses: list[FileStatus] = []
        self.names: set[str] = set()

    def run(self, file: IO[bytes], out: IO[bytes]) -> list[FileStatus]:
        """Copy; the statuses of images and of refused members, in their order."""
        with reading():
            source = open_archive(file, self.job.input.name, "r")
        sink = open_archive(out, self.job.output.name, "w")
        try:
            for member in each_member(source, self.work.limits):
                self.take(source, sink, member)
                self.write(sink, 2 * self.work.workers)
            self.write(sink, 0)
        finally:
            for _, _, content in self.waiting:
                if isinstance(content, Future):
                    content.cancel()
        sink.close()
        return self.statuses

    def take(self, source: ZipArchive | TarArchive, sink: ZipArchive | TarArchive, member: Member) -> None:
        """Read one member, and queue what is to be made of it."""
        name = renamed(member.name, self.format) if member.is_image else member.name
        if not member.refused and name in self.names:
            member.refused = f"another member is written as {name!r} already"
        if member.refused:
            error = FileStatus(f"{self.job.input}::{member.name}", None, "error", member.refused)
            self.waiting.append((name, member, _finished(error)))
            return
        self.names.add(name)
        if not member.is_image and member.size > SMALL:
            self.write(sink, 0)
            with reading():
                opened = source.open(member)
            sink.write(name, member.info, member.size, Checked(opened))
            return
        with reading():
            data = source.open(member).read()
        content = self.pool.submit(self.treat, name, member, data) if member.is_image else data
        self.waiting.append((name, member, content))

    def treat(self, name: str, member: Member, data: bytes) -> tuple[bytes | None, FileStatus]:
        """The bytes of a normalised image and its status."""
        work = self.work
        one = Job(Path(f"{self.job.input}::{member.name}"), Path(f"{self.job.output}::{name}"), name)
        try:
            picture = treat.open_picture(data, work.limits)
        except ImageReadError as error:
            return None, treat.failed(one, error)
        result, values, found = treat.normalize(picture, work.method, work.sources(self.job))
        status = treat.judged(one, picture, values, found, work.method)
        if status.status == "error":
            return None, status
        encoded = io.BytesIO()
        try:
            digest = treat.write(encoded, result, one, picture.form, work.quality)
        except (OSError, ValueError) as error:
            return None, treat.unwritten(one, error)
        out = encoded.getvalue()
        return out, replace(status, sha256=digest or hashlib.sha256(out).hexdigest())

    def write(self, sink: ZipArchive | TarArchive, most: int) -> None:
        """Write what is first in the queue until at most so many are left."""
        while len(self.waiting) > most:
            name, member, content = self.waiting.popleft()
            if isinstance(content, Future):
                data, status = content.result()
                self.statuses.append(status)
            else:
                data = content
            if data is not None:
                sink.write(name, member.info, len(data), io.BytesIO(data))


def _finished(error: FileStatus) -> Future[tuple[bytes | None, FileStatus]]:
    future: Future[tuple[bytes | None, FileStatus]] = Future()
    future.set_result((None, error))
    return future
