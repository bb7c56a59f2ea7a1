"""`normalize_files`: an archive of image files, from the plan to the status of every file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ernet_fast.console.atomic_file import remove_abandoned
from ernet_fast.scale.batches import normalize_batches
from ernet_fast.scale.encode import decoder
from ernet_fast.scale.folder_fit import folder_of, folders, images_of
from ernet_fast.scale.inputs import SUFFIX_OF, Job, Plan, plan
from ernet_fast.scale.method import Method, Values, values_of
from ernet_fast.scale.pipeline import Done, Work, normalize_each
from ernet_fast.scale.run_folder import claim, one_run, settings_of
from ernet_fast.scale.status import FileStatus, Summary, check_status_path, write_status
from ernet_fast.scale.target import PUBLISHED, check_constants, make_method, read_stains, saved_constants
from ernet_fast.scale.treat import USUAL_LIMITS, Limits
from ernet_fast.stain import MacenkoFit, ReinhardFit
from ernet_fast.stain.options import Options

FITS = ("per-image", "per-folder", "fixed")
FORMATS = ("keep", *SUFFIX_OF)
Stains = str | os.PathLike[str] | MacenkoFit | ReinhardFit


class Progress:
    """What a caller may want to hear while a run goes on; this one says nothing."""

    def begin(self, title: str, total: int) -> None:
        """A part of the run begins: `total` files are to be done."""

    def advance(self) -> None:
        """One of them is done."""

    def warning(self, text: str) -> None:
        """One line that a user should see."""


def normalize_files(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    target: Stains = PUBLISHED,
    method: str = "macenko",
    options: Options | None = None,
    fit: str = "per-image",
    source: Stains | None = None,
    format: str = "keep",
    quality: int | None = None,
    base: str | os.PathLike[str] | None = None,
    limits: Limits = USUAL_LIMITS,
    overwrite: bool = False,
    status: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Summary:
    """Normalise image files into a folder (or one file into another), many at a time.

    Names and folders are kept, and so are resolution, EXIF data (the orientation is applied), ICC profile, and of JPEG
    files the quantisation tables and chroma subsampling. The result does not depend on `workers` or the order of the
    inputs. What was written by an earlier run with the same settings is not written again.

    Args:
        inputs: files, folders, patterns, or `@list.txt`, see `ernet_fast.scale.inputs.plan`.
        output: a folder; for one input also the name of a file.
        target: the stains to give: an image file, a .safetensors or .pt file with the state dict of a normaliser,
            "published" (Macenko's), or a fit.
        method: "macenko" or "reinhard".
        options: constants of the method and what to do with images without stains of their own (`on_degenerate`; under
            "raise" they are errors). Default: the constants saved with the target, or the usual ones.
        fit: whose stains an image is taken to have: its own ("per-image"), those of all images of its folder together
            ("per-folder"), or those of `source` ("fixed").
        source: for "fixed": as `target`.
        format: "keep", or "png", "jpeg", "tiff", "webp".
        quality: of JPEG and lossy WebP files in place of the source's, 1 to 100.
        base: outputs are named by the paths of inputs below this folder; default: the deepest that holds all inputs.
        limits: what a file may hold.
        overwrite: write outputs that exist again, and replace those of other settings.
        status: a .csv file to write with one row a file.
        workers: images in memory at a time, each on a thread; default: one a core.
        device: "cpu", or "cuda" for batches on a GPU.
        progress: hears what is going on.

    Returns:
        The status of every file, in the order of the inputs' names.

    Raises:
        FileNotFoundError: no such input or target.
        FileExistsError: `output` is a file that exists, without `overwrite`.
        ValueError: settings that contradict each other, or those of the images in `output`; no image; an output that
            would replace an input.
        RuntimeError: another run is writing to `output`.
        OSError: a full disk, or a folder that cannot be written to. What is done remains, and the next call goes on.
    """
    _check(fit, source, format, quality, status, device)
    workers = _workers(workers)
    chosen = make_method(target, method, options)
    known = None if source is None else _known(source, method, chosen.options)
    paths = [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs
    planned = plan(paths, output, format=format, base=base)
    work = Work(chosen, limits=limits, quality=quality, workers=workers)
    run = _Run(planned, Path(output), work, fit, known, device, overwrite, progress or Progress())
    if planned.single:
        files = run.do_single()
    else:
        settings = settings_of(
            chosen, _name_of(target), fit=fit, source=None if known is None else list(known), format=format,
            quality=quality, transparent=limits.transparent, decoder=decoder(),
            **({} if source is None else {"source_image": _name_of(source)}),
        )  # fmt: skip
        files = run.do_folder(settings)
    summary = Summary(sorted([*files, *planned.ignored], key=lambda file: file.input), chosen.columns)
    if status is not None:
        write_status(status, summary.files, summary.columns)
    return summary


@dataclass
class _Run:
    """A call of `normalize_files`, after its arguments were read."""

    planned: Plan
    output: Path
    work: Work
    fit: str
    known: Values | None
    device: str
    overwrite: bool
    progress: Progress

    def do_single(self) -> list[FileStatus]:
        """One file into another."""
        if self.output.exists() and not self.overwrite:
            raise FileExistsError(f"{str(self.output)!r} exists; --overwrite replaces it.")
        return [status for _, status in self.normalize(self.planned.jobs)]

    def do_folder(self, settings: dict[str, Any]) -> list[FileStatus]:
        """All files, in a folder that no other run writes to."""
        jobs = self.planned.jobs
        with one_run(self.output):
            claim(self.output, jobs, settings, overwrite=self.overwrite)
            for folder in {job.output.parent for job in jobs}:
                if folder.is_dir():
                    remove_abandoned(folder)
            missing = [job for job in jobs if self.overwrite or not job.output.exists()]
            names = {job.name for job in missing}
            reason = "the output exists (--overwrite replaces it)"
            files = [
                FileStatus(str(job.input), str(job.output), "skipped", reason) for job in jobs if job.name not in names
            ]
            files += [status for _, status in self.normalize(missing)]
        return files

    def normalize(self, jobs: list[Job]) -> Done:
        """Do the jobs, each with its status as it is done."""
        work = self.with_sources(jobs)
        self.progress.begin("normalise", len(jobs))
        done = 0
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: self.say_stopped(done, len(jobs)))
            each = normalize_each(jobs, work) if self.device == "cpu" else normalize_batches(jobs, work, self.device)
            for job, status in each:
                done += 1
                self.progress.advance()
                yield job, status
            stack.pop_all()

    def say_stopped(self, done: int, of: int) -> None:
        """A run that is cut short says how far it came."""
        self.progress.warning(f"stopped after {done} of {of} files; run again to go on with the others")

    def with_sources(self, jobs: list[Job]) -> Work:
        """How the jobs are done, with the stains they are known to have."""
        if self.fit == "per-image":
            return self.work
        if self.fit == "fixed":
            return _with(self.work, lambda job: self.known)
        wanted = {folder_of(job) for job in jobs}
        of_folder = {name: own for name, own in folders(self.planned.jobs).items() if name in wanted}
        self.progress.begin("fit", sum(map(len, of_folder.values())))
        stains = {name: self.fit_folder(own) for name, own in of_folder.items()}
        return _with(self.work, lambda job: stains[folder_of(job)])

    def fit_folder(self, jobs: list[Job]) -> Values:
        """The stains of all images of a folder together."""

        def counted() -> Iterator[Any]:
            for image in images_of(jobs, self.work):
                self.progress.advance()
                yield image

        return self.work.method.fit_together(counted())[0]


def _with(work: Work, sources: Callable[[Job], Values | None]) -> Work:
    return Work(work.method, sources, work.limits, work.quality, work.workers)


def _check(fit: str, source: Any, format: str, quality: int | None, status: Any, device: str) -> None:
    """Raise ValueError for settings that are unknown or contradict each other."""
    for name, value, known in (("fit", fit, FITS), ("format", format, FORMATS), ("device", device, ("cpu", "cuda"))):
        if value not in known:
            raise ValueError(f"{name}={value!r}; expected one of {', '.join(map(repr, known))}.")
    if (fit == "fixed") != (source is not None):
        raise ValueError(
            f"fit={fit!r} with source={source!r}; 'fixed' takes the stains of all images from a source, and only it."
        )
    if quality is not None and not 1 <= quality <= 100:
        raise ValueError(f"quality={quality!r}; expected a number from 1 to 100.")
    if status is not None:
        check_status_path(status)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' (--device cuda), but torch sees no CUDA device here.")


def _workers(workers: int | None) -> int:
    if workers is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers < 1:
        raise ValueError(f"workers={workers} (--workers); expected a positive number.")
    return workers


def _known(source: Any, method: str, options: Options) -> Values:
    """The stains that all images have."""
    if method == "macenko":
        check_constants(saved_constants(source), options, "source", source)
    return values_of(read_stains(source, method, options).fit)


def _name_of(stains: Stains) -> str:
    return "given" if isinstance(stains, tuple) else os.fspath(stains)


__all__ = ["Method", "Progress", "normalize_files"]
