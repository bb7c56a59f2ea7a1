"""A run over an archive: what is done already, what is to be done, and the record of both."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ernet_fast.console.atomic_file import remove_abandoned
from ernet_fast.scale.archives import images_of_archive, normalize_archive
from ernet_fast.scale.batches import normalize_batches
from ernet_fast.scale.containers import ArchiveError
from ernet_fast.scale.folder_fit import Grouping, fingerprint, groups, images_of
from ernet_fast.scale.inputs import Job, Plan
from ernet_fast.scale.journal import Journal, Record, Records, journal_of, merge_journals, read_journals
from ernet_fast.scale.method import Values
from ernet_fast.scale.pipeline import Work, digest_of, normalize_each
from ernet_fast.scale.run_folder import claim, one_run, refuse_other_settings
from ernet_fast.scale.shard import Shard
from ernet_fast.scale.slides import SlideForm, normalize_whole_slide
from ernet_fast.scale.status import FileStatus
from ernet_fast.scale.treat import failed

Finished = tuple[Job, FileStatus, tuple[FileStatus, ...]]
"""A job, its status, and those of the images of an archive."""

TOGETHER = ("per-folder", "per-slide")
"""Fits of several images together."""

WRITTEN = ("ok", "degenerate")
_REPLACE = "(--overwrite replaces it)"


class Progress:
    """What a caller may want to hear while a run goes on; this one says nothing."""

    def begin(self, title: str, total: int) -> None:
        """A part of the run begins: `total` files are to be done."""

    def advance(self) -> None:
        """One of them is done."""

    def warning(self, text: str) -> None:
        """One line that a user should see."""


@dataclass
class Run:
    """A call of `normalize_files`, after its arguments were read."""

    planned: Plan
    output: Path
    work: Work
    fit: str
    known: Values | None  # for "fixed"
    format: str
    device: str
    overwrite: bool
    checksum: bool
    shard: Shard | None
    slides: SlideForm | None
    progress: Progress
    group: Grouping = field(default_factory=Grouping)
    keys: dict[str, str] = field(default_factory=dict)  # folder or slide -> what its fit was made of

    def do_single(self) -> list[FileStatus]:
        """One file into another."""
        if self.output.exists() and not self.overwrite:
            raise FileExistsError(f"{str(self.output)!r} exists; --overwrite replaces it.")
        done = self.normalize(self.planned.jobs, Records(), None)
        return [row for _, status, members in done for row in rows(status, members)]

    def do_folder(self, settings: dict[str, Any]) -> tuple[list[FileStatus], frozenset[str]]:
        """All files, in a folder that no other run writes to; also the inputs that were done before."""
        with one_run(self.output, shard=self.shard):
            jobs = self.planned.jobs
            claim(self.output, jobs, settings, overwrite=self.overwrite, shared=self.shard is not None)
            for folder in {self.output, *(job.output.parent for job in jobs)}:
                if folder.is_dir():
                    remove_abandoned(folder)
            records = read_journals(self.output)
            if self.shard is None:
                merge_journals(self.output, records)
            jobs = self.stamped(jobs)
            before, missing, kept = self.sorted_out(jobs, records)
            journal = Journal(journal_of(self.output, str(self.shard or "")))
            with contextlib.closing(journal):
                journal.begin(missing)
                self.remove_outdated(missing, records)
                files = [*before, *kept]
                for job, status, members in self.normalize(missing, records, journal):
                    journal.done(job, self.key(job), status, members)
                    files += rows(status, members)
        return files, frozenset(status.input for status in before)

    def verify(self, settings: dict[str, Any]) -> list[FileStatus]:
        """Whether everything is done and unchanged since; nothing is written."""
        with one_run(self.output, make=False, shard=self.shard):
            refuse_other_settings(self.output, settings)
            records, jobs = read_journals(self.output), self.stamped(self.planned.jobs)
            self.progress.begin("verify", len(jobs))
            files = []
            with ThreadPoolExecutor(self.work.workers) as pool:
                for found in pool.map(partial(self.verified, records), jobs):
                    self.progress.advance()
                    files += found
        return files

    def stamped(self, jobs: list[Job]) -> list[Job]:
        """The jobs, with the checksums of their inputs if these are asked for, and the keys of their folders' fits."""
        if self.checksum:
            self.progress.begin("checksums", len(jobs))
            with ThreadPoolExecutor(self.work.workers) as pool:
                digests = []
                for digest in pool.map(_digest_or_nothing, jobs):
                    digests.append(digest)
                    self.progress.advance()
            jobs = [replace(job, sha256=digest) for job, digest in zip(jobs, digests, strict=True)]
        if self.together:
            self.keys = {name: fingerprint(own) for name, own in groups(jobs, self.group).items()}
        self.planned = replace(self.planned, jobs=jobs)
        return jobs

    @property
    def together(self) -> bool:
        """Whether images of a folder or a slide are fitted together."""
        return self.slides is None and self.fit in TOGETHER

    def key(self, job: Job) -> str:
        """What the stains that the job's image is taken to have depend on, beside the settings."""
        return "" if job.is_archive or not self.together else self.keys.get(self.group(job), "")

    def is_current(self, job: Job, record: Record) -> bool:
        """Whether a record is of the input as it is now, with the stains it is taken to have now."""
        known = record.status.input_sha256  # of archives and slides only if it was asked for then, too
        same = known == job.sha256 if job.sha256 and known else record.stamp == job.stamp
        return same and record.key == self.key(job)

    def sorted_out(self, jobs: list[Job], records: Records) -> tuple[list[FileStatus], list[Job], list[FileStatus]]:
        """The files done before, the jobs to be done, and files in whose outputs' places are others."""
        before, missing, kept = [], [], []
        changed = 0
        for job in jobs:
            record, size = records.done.get(job.name), _size_of(job.output)
            if self.overwrite or size is None:
                missing.append(job)
            elif record is None and job.name in records.begun:
                missing.append(job)  # cut short after its output had its name
            elif record is None or record.bytes != size:
                unknown = record is None or record.bytes < 0
                what = "exists, and no record says what it is" if unknown else "was changed after it was written"
                reason = f"the output {what} {_REPLACE}"
                kept.append(FileStatus(str(job.input), str(job.output), "skipped", reason))
            elif self.is_current(job, record) and record.status.status in WRITTEN:
                before += recorded(job, record)
            else:
                changed += record.status.status in WRITTEN
                missing.append(job)
        if changed:
            self.progress.warning(
                f"{changed} inputs (or others of their folders or slides) changed since; they are done again"
            )
        return before, missing, kept

    def remove_outdated(self, jobs: list[Job], records: Records) -> None:
        """Remove outputs of inputs that have changed: if the new ones fail, nothing old passes for their result."""
        for job in jobs:
            record = records.done.get(job.name)
            if record is not None and not self.is_current(job, record):
                with contextlib.suppress(OSError):  # writing it will say why
                    job.output.unlink(missing_ok=True)

    def verified(self, records: Records, job: Job) -> list[FileStatus]:
        """The status of a job, which is "error" if its output is not what the record says."""
        record = records.done.get(job.name)
        wrong = FileStatus(str(job.input), str(job.output), "error")
        if record is None:
            return [replace(wrong, reason="not done yet")]
        if not self.is_current(job, record):
            return [replace(wrong, reason="the input (or another of its folder or slide) has changed since")]
        if record.status.status not in WRITTEN:
            return recorded(job, record)
        try:
            digest = digest_of(job.output)
        except OSError as error:
            return [replace(wrong, reason=f"the output cannot be read: {error.strerror}")]
        if digest != record.status.sha256:
            return [replace(wrong, reason=f"the output has changed: its SHA-256 is {digest}")]
        return recorded(job, record)

    def normalize(self, jobs: list[Job], records: Records, journal: Journal | None) -> Iterator[Finished]:
        """Do the jobs, each with its status as it is done; when that is cut short, say how far it came."""
        images = [] if self.slides else [job for job in jobs if not job.is_archive]
        work = replace(self.work, sources=self.sources(images, records, journal))
        self.progress.begin("normalise", len(jobs))
        done = 0
        with contextlib.ExitStack() as stack:
            stack.callback(
                lambda: self.progress.warning(
                    f"stopped after {done} of {len(jobs)} files; run again to go on with the others"
                )
            )
            each = (
                normalize_each(images, work) if self.device == "cpu" else normalize_batches(images, work, self.device)
            )
            for job, status in each:
                done += 1
                self.progress.advance()
                yield job, status, ()
            for job in jobs:
                if job.is_archive or self.slides:
                    status, members = (self.normalize_slide(job), ()) if self.slides else self.normalize_archive(job)
                    done += 1
                    self.progress.advance()
                    yield job, replace(status, input_sha256=job.sha256), members
            stack.pop_all()

    def normalize_archive(self, job: Job) -> tuple[FileStatus, tuple[FileStatus, ...]]:
        """One archive, which counts as a folder."""
        known = self.known
        if self.fit == "per-folder":
            try:
                known = self.work.method.fit_together(images_of_archive(job, self.work.limits))[0]
            except ArchiveError as error:
                return failed(job, error), ()
        return normalize_archive(job, replace(self.work, sources=lambda job: known), self.format)

    def normalize_slide(self, job: Job) -> FileStatus:
        """One whole slide."""
        assert self.slides is not None
        known = self.known if self.fit == "fixed" else None

        def begin(tiles: int) -> None:
            self.progress.begin(job.input.name, tiles)

        return normalize_whole_slide(job, self.slides, self.work, known, begin, self.progress.advance)

    def sources(self, jobs: list[Job], records: Records, journal: Journal | None) -> Callable[[Job], Values | None]:
        """The stains that the jobs' images are known to have."""
        if self.fit == "fixed":
            return lambda job: self.known
        if not self.together:
            return lambda job: None
        wanted = {self.group(job) for job in jobs}
        stains = {name: found for name, (key, found) in records.fits.items() if key == self.keys.get(name)}
        missing = wanted - stains.keys()
        of_group = {name: own for name, own in groups(self.planned.jobs, self.group).items() if name in missing}
        self.progress.begin("fit", sum(map(len, of_group.values())))
        for name, own in of_group.items():
            stains[name] = self.fit_group(own)
            if journal is not None:
                journal.fit(name, self.keys[name], stains[name])
        return lambda job: stains[self.group(job)]

    def fit_group(self, jobs: list[Job]) -> Values:
        """The stains of all images of a folder or slide together."""

        def counted() -> Iterator[Any]:
            for image in images_of(jobs, self.work):
                self.progress.advance()
                yield image

        return self.work.method.fit_together(counted())[0]


def rows(status: FileStatus, members: tuple[FileStatus, ...]) -> list[FileStatus]:
    """What a table says about a job: of an archive that was written, its images."""
    return list(members) if members else [status]


def recorded(job: Job, record: Record) -> list[FileStatus]:
    """The same of a job that was done before, under the names that its files have now."""

    def named(status: FileStatus) -> FileStatus:
        parts = [None if name is None else name.partition("::")[1:] for name in (status.input, status.output)]
        names = [None if part is None else f"{path}{''.join(part)}" for part, path in zip(parts, places, strict=True)]
        return replace(status, input=names[0] or "", output=names[1])

    places = (job.input, job.output)
    if record.members:
        return [named(member) for member in record.members]
    return [replace(record.status, input=str(job.input), output=record.status.output and str(job.output))]


def _size_of(path: Path) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _digest_or_nothing(job: Job) -> str:
    """The checksum of an input; "-" if it cannot be read."""
    try:
        return digest_of(job.input)
    except OSError:
        return "-"
