"""`normalize_files`: an archive of image files, from the plan to the status of every file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ernet_fast.data.slide_reader import reader_version
from ernet_fast.scale.encode import decoder
from ernet_fast.scale.folder_fit import Grouping, check_groups, grouping
from ernet_fast.scale.inputs import SLIDE_OUTPUTS, SUFFIX_OF, Plan, plan
from ernet_fast.scale.method import Values, values_of
from ernet_fast.scale.pipeline import Work
from ernet_fast.scale.preview import check_preview_path, write_preview
from ernet_fast.scale.run import TOGETHER, Progress, Run
from ernet_fast.scale.run_folder import settings_of
from ernet_fast.scale.shard import Shard, read_shard, status_of_shard
from ernet_fast.scale.slide_writer import needs_writer
from ernet_fast.scale.slides import SlideForm
from ernet_fast.scale.status import FileStatus, Summary, check_status_path, write_status
from ernet_fast.scale.target import PUBLISHED, check_constants, make_method, read_stains, saved_constants
from ernet_fast.scale.treat import USUAL_LIMITS, Limits
from ernet_fast.stain import MacenkoFit, ReinhardFit
from ernet_fast.stain.options import Options

FITS = ("per-image", "per-folder", "per-slide", "fixed")
FORMATS = ("keep", *SUFFIX_OF)
Stains = str | os.PathLike[str] | MacenkoFit | ReinhardFit


def normalize_files(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    target: Stains = PUBLISHED,
    method: str = "macenko",
    options: Options | None = None,
    fit: str = "per-image",
    source: Stains | None = None,
    slide_pattern: str | None = None,
    format: str = "keep",
    quality: int | None = None,
    base: str | os.PathLike[str] | None = None,
    limits: Limits = USUAL_LIMITS,
    slides: SlideForm | None = None,
    overwrite: bool = False,
    checksum: bool = False,
    verify: bool = False,
    shard: str | Shard | None = None,
    status: str | os.PathLike[str] | None = None,
    preview: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Summary:
    """Normalise image files, and archives of them, into a folder (or one file into another), many at a time.

    Names and folders are kept, and so are resolution, EXIF data (the orientation is applied), ICC profile, and of JPEG
    files the quantisation tables and chroma subsampling. The result does not depend on `workers` or the order of the
    inputs. What was written by an earlier run with the same settings is not written again, so that a run that was
    stopped or killed goes on where it was.

    Args:
        inputs: files, folders, patterns, or `@list.txt`, see `ernet_fast.scale.inputs.plan`. Archives (.zip, .tar,
            .tar.gz) become archives of the same members; each counts as a folder, and works on the CPU.
        output: a folder; for one input also the name of a file.
        target: the stains to give: an image file, a .safetensors or .pt file with the state dict of a normaliser,
            "published" (Macenko's), or a fit.
        method: "macenko" or "reinhard".
        options: constants of the method and what to do with images without stains of their own (`on_degenerate`; under
            "raise" they are errors). Default: the constants saved with the target, or the usual ones.
        fit: whose stains an image is taken to have: its own ("per-image"), those of all images of its folder together
            ("per-folder"), those of all images of its slide together ("per-slide"), or those of `source` ("fixed").
        source: for "fixed": as `target`.
        slide_pattern: for "per-slide" of images, a regular expression that finds the slide in the path of an image
            below `base`: its first group, or all that it matches. Not for archives.
        format: "keep", or "png", "jpeg", "tiff", "webp", "zarr" (OME-Zarr in a zip file).
        quality: of JPEG and lossy WebP files in place of the source's, 1 to 100.
        base: outputs are named by the paths of inputs below this folder; default: the deepest that holds all inputs.
        limits: what a file may hold.
        slides: inputs are whole slides, and become pyramids in this form (extra "slides"). Stains are fitted on tiles
            with tissue of the whole slide ("per-slide", the same as "per-image"). Not with "per-folder", `format`,
            `quality` and "cuda".
        overwrite: write outputs that exist again, and replace those of other settings.
        checksum: inputs are unchanged if their SHA-256 is that of the time when they were done; by default, if their
            size and time of change are.
        verify: write nothing, but hold every output against the record: files that are missing, changed, or made of
            another input have the status "error".
        shard: do only what falls to this one of several machines: "I/N", or "auto" for what the environment of a job
            says, see `ernet_fast.scale.shard.read_shard`. Folders or slides that are
            fitted together are not divided.
        status: a .csv or .parquet file to write with one row a file; that of a shard is called status.2-of-8.csv.
        preview: a .png or .jpg file to draw pairs of images before and after into: those whose stains differ most from
            the median of all, and some others; of slides with the outline of their tissue.
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
    if slides is not None and fit == "per-image":
        fit = "per-slide"
    group = grouping("per-image" if slides is not None else fit, slide_pattern)
    if preview is not None:
        check_preview_path(preview)
    workers = _workers(workers)
    chosen = make_method(target, method, options)
    known = None if source is None else known_stains(source, method, chosen.options)
    paths = [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs
    planned = plan(paths, output, format=format, base=base, slides="" if slides is None else f".{slides.format}")
    written = {} if slides is None else _check_slides(slides, fit, format, quality, device)
    check_groups(planned.jobs, group)
    part = read_shard(shard) if isinstance(shard, str) else shard
    if part is not None:
        planned = _share(planned, part, group if slides is None and fit in TOGETHER else None, overwrite)
    work = Work(chosen, limits=limits, quality=quality, workers=workers)
    said = progress or Progress()
    run = Run(planned, Path(output), work, fit, known, format, device, overwrite, checksum, part, slides, said, group)
    before: frozenset[str] = frozenset()
    if planned.single:
        if verify:
            raise ValueError("verify (--verify) looks at a folder of outputs; of a single file nothing is recorded.")
        files = run.do_single()
    else:
        settings = settings_of(
            chosen, _name_of(target), fit=fit, source=None if known is None else list(known), format=format,
            quality=quality, transparent=limits.transparent, decoder=decoder(),
            **written,
            **({} if slide_pattern is None else {"slide_pattern": slide_pattern}),
            **({} if source is None else {"source_image": _name_of(source)}),
        )  # fmt: skip
        if verify:
            files = run.verify(settings)
        else:
            files, before = run.do_folder(settings)
    summary = Summary(sorted([*files, *planned.ignored], key=lambda file: file.input), chosen.columns, before)
    if status is not None:
        write_status(status_of_shard(status, part), summary.files, summary.columns)
    if preview is not None:
        write_preview(status_of_shard(preview, part), summary, None if slides is None else chosen.tissue)
    return summary


def normalize_slide(
    slide: str | os.PathLike[str], output: str | os.PathLike[str], form: SlideForm | None = None, **options: Any
) -> FileStatus:
    """Normalise one whole slide into a pyramidal, tiled BigTIFF file, in constant memory.

    Args:
        slide: the file, of any format that OpenSlide reads.
        output: the file to write, .tif (generic), .ome.tif, .svs or .zarr.zip.
        form: which part, and how it is written.
        options: of `normalize_files`: target, method, options, fit ("fixed" for known stains), source, overwrite,
            workers, progress.

    Raises:
        ImportError: the extra "slides" is missing.
        ValueError, OSError: as `normalize_files`.
    """
    if Path(output).is_dir() or not str(output).lower().endswith(SLIDE_OUTPUTS):
        raise ValueError(
            f"output {str(output)!r} is no name of a slide; expected one that ends in .tif, .svs or .zarr.zip."
        )
    return normalize_files(slide, output, slides=form or SlideForm(), **options).files[0]


def _share(planned: Plan, shard: Shard, group: Grouping | None, overwrite: bool) -> Plan:
    """The part of the plan that falls to a shard; images of one `group` stay together."""
    if planned.single:
        raise ValueError("--shard divides the files of a folder; the output is a single file.")
    if overwrite:
        raise ValueError(
            "--overwrite begins a folder anew, which shards cannot do together; remove the folder, or choose another."
        )
    jobs = [job for job in planned.jobs if shard.takes(job.name if group is None or job.is_archive else group(job))]
    ignored = [
        file for file in planned.ignored if shard.takes(os.path.relpath(os.path.abspath(file.input), planned.base))
    ]
    return replace(planned, jobs=jobs, ignored=ignored)


def _check(fit: str, source: Any, format: str, quality: int | None, status: Any, device: str) -> None:
    """Raise ValueError for settings that are unknown or contradict each other."""
    check_fit(fit, source)
    _check_known("format", format, FORMATS)
    _check_known("device", device, ("cpu", "cuda"))
    if quality is not None and not 1 <= quality <= 100:
        raise ValueError(f"quality={quality!r}; expected a number from 1 to 100.")
    if status is not None:
        check_status_path(status)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' (--device cuda), but torch sees no CUDA device here.")


def _check_slides(slides: SlideForm, fit: str, format: str, quality: Any, device: str) -> dict[str, Any]:
    """What the settings say about slides; ValueError for what does not go with them."""
    for name, found in (
        ("fit='per-folder'", fit == "per-folder"), ("format", format != "keep"), ("quality", quality is not None),
        ("device='cuda'", device != "cpu"),
    ):  # fmt: skip
        if found:
            raise ValueError(f"{name} is for images, not for whole slides.")
    needs_writer(slides.compression)
    form = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(slides).items()}
    return {"slides": form, "slide_reader": reader_version()}


def check_fit(fit: str, source: Any) -> None:
    """Raise ValueError for an unknown fit, or one that contradicts the source."""
    _check_known("fit", fit, FITS)
    if (fit == "fixed") != (source is not None):
        raise ValueError(
            f"fit={fit!r} with source={source!r}; 'fixed' takes the stains of all images from a source (--source), and "
            "only it."
        )


def _check_known(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(map(repr, known))}.")


def _workers(workers: int | None) -> int:
    if workers is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers < 1:
        raise ValueError(f"workers={workers} (--workers); expected a positive number.")
    return workers


def known_stains(source: Any, method: str, options: Options) -> Values:
    """The stains that all images have, of "fixed"; raises as `read_stains`."""
    if method == "macenko":
        check_constants(saved_constants(source), options, "source", source)
    return values_of(read_stains(source, method, options).fit)


def _name_of(stains: Stains) -> str:
    return "given" if isinstance(stains, tuple) else os.fspath(stains)


__all__ = ["Progress", "normalize_files", "normalize_slide"]
