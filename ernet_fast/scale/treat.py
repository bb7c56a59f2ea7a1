"""One image: decoded, normalised, encoded, and what is to be said about it."""

from __future__ import annotations

import errno
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ernet_fast.data import ImageReadError
from ernet_fast.data.file_form import FileForm
from ernet_fast.data.image_io import TRANSPARENT, decode, read_file
from ernet_fast.scale.encode import HashedFile, encode
from ernet_fast.scale.inputs import Job
from ernet_fast.scale.method import Method, Values
from ernet_fast.scale.status import FileStatus
from ernet_fast.stain import MacenkoStatus

FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Reasons why no further file could be written either."""


@dataclass(frozen=True)
class Limits:
    """What a file may hold; more is refused before it is decoded.

    Attributes:
        pixels: of an image: it takes about eight bytes of memory for each.
        bytes: of a file.
        transparent: what becomes of pixels that are not opaque: "refuse", "white" (composed on white), or "drop" (their
            colour as it is).
    """

    pixels: int = 1 << 29
    bytes: int = 1 << 32
    transparent: str = "refuse"

    def __post_init__(self) -> None:
        for name in ("pixels", "bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"the limit of {name} is {getattr(self, name)!r}; expected a positive number.")
        if self.transparent not in TRANSPARENT:
            known = ", ".join(map(repr, TRANSPARENT))
            raise ValueError(f"transparent={self.transparent!r}; expected one of {known}.")


USUAL_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded image [H, W, 3] uint8 and the form of its file."""

    pixels: np.ndarray
    form: FileForm
    sha256: str  # of the file


def load(job: Job, limits: Limits) -> bytes:
    """The bytes of an input; ImageReadError or OSError if they cannot be had."""
    if job.size > limits.bytes:
        raise ImageReadError(f"{job.size} bytes, more than the limit of {limits.bytes}")
    return read_file(job.input)


def open_picture(data: bytes, limits: Limits) -> Picture:
    """Decode the bytes of a file; ImageReadError if that is impossible or beyond the limits."""
    pixels, form = decode(data, max_pixels=limits.pixels, transparent=limits.transparent)
    return Picture(pixels, form, hashlib.sha256(data).hexdigest())


def failed(job: Job, error: Exception) -> FileStatus:
    """The status of a job that `error` ended."""
    return FileStatus(str(job.input), None, "error", reason_of(error, job.input))


def normalize(picture: Picture, method: Method, source: Values | None) -> tuple[torch.Tensor, Values, MacenkoStatus]:
    """Normalised pixels [H, W, 3], and the stains the image was taken to have."""
    (result,), values, status = method.normalize([torch.from_numpy(picture.pixels)], source)
    found = MacenkoStatus(int(status[0]))
    return result, tuple(values[0].tolist()) if found == MacenkoStatus.OK else (), found


def judged(job: Job, picture: Picture, values: Values, status: MacenkoStatus, method: Method) -> FileStatus:
    """The status of a normalised image; it is not to be written if that is "error"."""
    height, width, _ = picture.pixels.shape
    on_degenerate = method.options.on_degenerate
    seen = (width, height, method.tissue.share(picture.pixels), values, "", picture.sha256)
    if status == MacenkoStatus.OK:
        return FileStatus(str(job.input), str(job.output), "ok", "", *seen)
    if on_degenerate == "raise":
        return FileStatus(str(job.input), None, "error", status.reason, *seen)
    done = "copied unchanged" if on_degenerate == "identity" else "taken to be stained like the target"
    return FileStatus(str(job.input), str(job.output), "degenerate", f"{status.reason}; {done}", *seen)


def write(file: IO[bytes], result: torch.Tensor, job: Job, form: FileForm, quality: int | None) -> str:
    """Encode pixels [H, W, 3] on the CPU; the SHA-256 of the file if that is known without reading it again, or ""."""
    hashed: Any = HashedFile(file)
    encode(hashed, np.ascontiguousarray(result.numpy()), job.output.name, form, quality)
    return hashed.sha256


def unwritten(job: Job, error: Exception) -> FileStatus:
    """The status of a job whose output cannot be written; raises errors that end everything."""
    if isinstance(error, OSError) and error.errno in FATAL:
        raise error
    reason = f"{job.output} cannot be written: {reason_of(error, job.output)}"
    return FileStatus(str(job.input), None, "error", reason)


def reason_of(error: Exception, path: Path) -> str:
    """One line: the error without the file name it begins with."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.removeprefix(f"{path}: ").splitlines() or [type(error).__name__])[0]
