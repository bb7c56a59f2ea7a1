"""Which files are read, and where each is written."""

from __future__ import annotations

import functools
import glob
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ernet_fast.data.layout import IMAGE_SUFFIXES as SUFFIXES
from ernet_fast.data.layout import OTHER_IMAGE_SUFFIXES, is_hidden
from ernet_fast.scale.status import FileStatus
from ernet_fast.scale.zarr_file import SUFFIX as ZARR

READABLE = "PNG, JPEG, TIFF or WebP"
IMAGE_SUFFIXES = (*SUFFIXES, ".webp")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
SUFFIX_OF = {"png": ".png", "jpeg": ".jpg", "tiff": ".tif", "webp": ".webp", "zarr": ZARR}
"""Suffix of the outputs in each format that can be asked for."""

SLIDE_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".svslide", ".tif", ".tiff")
SLIDE_OUTPUTS = (".tif", ".tiff", ".svs", ZARR)
_OTHER_PICTURES = (*OTHER_IMAGE_SUFFIXES, ".svs", ".ndpi", ".mrxs")
_WILD = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class Job:
    """A file to read and a file to write.

    Attributes:
        input: the file to read.
        output: the file to write.
        name: the output's path below the output folder, with slashes; the name of the job in records.
        size: bytes of the input; 0 if it cannot be looked at.
        mtime: when the input was last changed, in nanoseconds.
        sha256: of the input, where it is to be looked at; "-" if it cannot be read.
    """

    input: Path
    output: Path
    name: str
    size: int = 0
    mtime: int = 0
    sha256: str = ""

    @property
    def stamp(self) -> str:
        """Another for an input that has changed, unless it takes pains to hide that."""
        return f"{self.size}-{self.mtime}"

    @property
    def is_archive(self) -> bool:
        """Whether the input is an archive of images."""
        return bool(archive_suffix(self.input.name))


@dataclass(frozen=True)
class Plan:
    """What is to be done, in the order of the inputs' names, and what looks like a picture and cannot be read.

    `base` is the folder below which the structure of the inputs is kept; `single` if the output is a file.
    """

    jobs: list[Job]
    ignored: list[FileStatus]
    base: Path
    single: bool


def plan(
    inputs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], *, format: str = "keep",
    base: str | os.PathLike[str] | None = None, slides: str = "",
) -> Plan:  # fmt: skip
    """What is to be written where.

    Args:
        inputs: files, folders (searched with all their subfolders), patterns (`*`, `**`, `?`, `[...]`) of either, and
            `@list.txt`, a file with one of these a line; a line that is empty or begins with # says nothing.
        output: the folder for all outputs; for one file, also the name of a file.
        format: "keep", or one of `SUFFIX_OF`.
        base: outputs are named by the paths of their inputs below this folder; by default it is the deepest folder
            that holds all inputs.
        slides: read whole slides instead of images, and give the outputs this suffix.

    Raises:
        FileNotFoundError: no such input, or nothing that fits a pattern.
        NotADirectoryError: the output is a file, or has the name of one, where a folder is needed.
        ValueError: an output would take the place of an input or lie outside the output folder, two outputs have one
            name, an input lies outside `base`, or there is no image.
    """
    output = Path(output)
    sources = _expand(inputs)
    single = len(sources) == 1 and is_single(sources[0], output, slides)
    if not single and (is_output(output.name) or output.exists()) and not output.is_dir():
        kinds = f", or the name of a slide ({', '.join(SLIDE_OUTPUTS)})" if slides and len(sources) == 1 else ""
        raise NotADirectoryError(
            f"{str(output)!r} is a file or has the name of an image or archive; expected a folder to write to{kinds}."
        )
    _check_apart(sources, output)
    found, ignored = _sorted_out(sources, slides)
    if not found:
        raise ValueError(_nothing_in(sources, slides, hint=True))
    root = _base(sources, base)
    if format != "keep" and single and renamed(output.name, format) != output.name and not archive_suffix(output.name):
        raise ValueError(f"--format {format}, but the output is {str(output)!r}; drop one of the two.")
    jobs = []
    below = os.path.join(root, "")
    for key, path in found.items():  # a path is looked at as often as it must, of a hundred thousand
        inside = key.removeprefix(below) if key.startswith(below) else os.path.relpath(key, root)
        name = output.name if single else inside
        if slides and not single:
            name = os.path.splitext(name)[0] + slides
        elif not archive_suffix(name):
            name = renamed(name, format)
        jobs.append(_job(path, output if single else output / name, name))
    _check_outputs(jobs, output.parent if single else output)
    return Plan(jobs, ignored, root, single)


def image_files(
    inputs: Sequence[str | os.PathLike[str]], *, slides: bool = False
) -> tuple[list[Path], list[tuple[Path, str]]]:
    """The images, or whole slides, that `inputs` name as in `plan`, each once, and (path, reason) of what is not read.

    Archives are not opened.

    Raises:
        FileNotFoundError: no such input, or nothing that fits a pattern.
        ValueError: there is nothing to read.
    """
    sources = _expand(inputs)
    found, ignored = _sorted_out(sources, SLIDE_SUFFIXES[0] if slides else "")
    left_out = [(Path(status.input), status.reason) for status in ignored]
    left_out += [(path, "an archive; unpack it first") for path in found.values() if archive_suffix(path.name)]
    images = [path for path in found.values() if not archive_suffix(path.name)]
    if not images:
        raise ValueError(_nothing_in(sources, slides))
    return images, left_out


def _nothing_in(sources: list[Path], slides: object, *, hint: bool = False) -> str:
    """What to say where there is nothing to read; with a hint if there is something of the other kind."""
    what, other = ("whole slide", "images") if slides else (f"{READABLE} image", "slides")
    text = f"no {what} in {', '.join(repr(str(source)) for source in sources[:3])}."
    if hint and _sorted_out(sources, "" if slides else SLIDE_SUFFIXES[0])[0]:
        tables = "lut" if slides else "slide-lut"
        text += f" There are {'images' if slides else 'whole slides'}, for --as {other} or --as {tables}."
    return text


def is_single(source: Path, output: Path, slides: str = "") -> bool:
    """Whether `output` names one file to write rather than a folder: one image in, and an image's name out; or one
    archive, and the name of another.
    """
    if not source.is_file() or output.is_dir():
        return False
    if slides:
        return output.name.lower().endswith(SLIDE_OUTPUTS)
    suffixes = ARCHIVE_SUFFIXES if archive_suffix(source.name) else (*IMAGE_SUFFIXES, ZARR)
    return output.name.lower().endswith(suffixes)


def archive_suffix(name: str) -> str:
    """The suffix of the name of an archive, in lower case; empty for any other name."""
    return next((suffix for suffix in ARCHIVE_SUFFIXES if name.lower().endswith(suffix)), "")


def is_output(name: str) -> bool:
    """Whether a file of this name may be an output of a run."""
    return name.lower().endswith((*IMAGE_SUFFIXES, *SLIDE_OUTPUTS, *ARCHIVE_SUFFIXES))


def renamed(name: str, format: str) -> str:
    """The name of the output in `format` of an image `name`."""
    if format == "keep" or SUFFIX_OF[format] == _plain_suffix(Path(name)) or name.lower().endswith(SUFFIX_OF[format]):
        return name
    return os.path.splitext(name)[0] + SUFFIX_OF[format]


def _plain_suffix(path: Path) -> str:
    """The suffix by which its format is known here."""
    suffix = path.suffix.lower()
    return {".jpeg": ".jpg", ".tiff": ".tif"}.get(suffix, suffix)


def _job(path: Path, output: Path, name: str) -> Job:
    try:
        found = path.stat()
    except OSError:  # reading it will say why
        return Job(path, output, name.replace(os.sep, "/"))
    return Job(path, output, name.replace(os.sep, "/"), found.st_size, found.st_mtime_ns)


def _expand(inputs: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files and folders that are meant, each once."""
    found: dict[str, Path] = {}
    for given in inputs:
        text = os.fspath(given)
        if text.startswith("@") and not os.path.exists(text):
            for line in _lines(text[1:]):
                found.update((os.path.abspath(path), path) for path in _matches(line, f" (in {text[1:]!r})"))
        else:
            found.update((os.path.abspath(path), path) for path in _matches(text, ""))
    return list(found.values())


def _lines(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except FileNotFoundError:
        raise FileNotFoundError(f"no list of inputs at {path!r}.") from None
    lines = [line.strip("\r") for line in text.split("\n")]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _matches(text: str, where: str) -> list[Path]:
    if os.path.exists(text) or os.path.islink(text):
        return [Path(text)]
    if not _WILD & set(text):
        raise FileNotFoundError(f"no file or folder {text!r}{where}.")
    found = sorted(glob.glob(text, recursive=True))
    if not found:
        raise FileNotFoundError(f"no file or folder fits {text!r}{where}.")
    return list(map(Path, found))


def _base(sources: list[Path], base: str | os.PathLike[str] | None) -> Path:
    folders = [os.path.abspath(path if path.is_dir() else path.parent) for path in sources]
    if base is None:
        return Path(os.path.commonpath(folders))
    root = os.path.abspath(base)
    for folder, path in zip(folders, sources, strict=True):
        if os.path.commonpath([root, folder]) != root:
            raise ValueError(f"the input {str(path)!r} does not lie in the base folder {str(base)!r}.")
    return Path(root)


def _check_apart(sources: list[Path], output: Path) -> None:
    place = Path(os.path.realpath(output))
    for source in sources:
        if source.is_dir() and place.is_relative_to(os.path.realpath(source)):
            raise ValueError(
                f"the output folder {str(output)!r} is the input folder or lies in it; choose one outside of "
                f"{str(source)!r}."
            )


def _sorted_out(sources: list[Path], slides: str) -> tuple[dict[str, Path], list[FileStatus]]:
    """The images to read by their absolute paths, in order, and what looks like one and is not read."""
    inputs: dict[str, Path] = {}
    ignored: dict[str, FileStatus] = {}
    others = () if slides else _OTHER_PICTURES
    for source in sources:
        for key, path in _below(source):
            suffixes, what = (SLIDE_SUFFIXES, "whole slides are") if slides else (IMAGE_SUFFIXES, f"{READABLE} is")
            readable = path.suffix.lower() in suffixes or (not slides and bool(archive_suffix(path.name)))
            reason = _not_a_file(path)
            if reason is None and not readable:
                reason = f"{path.suffix or 'no suffix'}: only {what} read"
            if reason is None:
                inputs.setdefault(key, path)
            elif readable or path.suffix.lower() in others or path.is_dir() or path == source:
                ignored.setdefault(key, FileStatus(str(path), None, "skipped", reason))
    return dict(sorted(inputs.items())), list(ignored.values())


def _not_a_file(path: Path) -> str | None:
    """Why there is nothing to read; None for files and for links that lead nowhere, which fail when they are read."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return None
    if stat.S_ISDIR(mode):
        return "a link to a folder; links are not followed"
    return None if stat.S_ISREG(mode) else "a FIFO, socket or device, not a file"


def files_below(source: Path) -> Iterator[Path]:
    """The files, and links to folders, below `source` in the order of their names; hidden ones are left out."""
    return (path for _, path in _below(source))


def _below(source: Path) -> Iterator[tuple[str, Path]]:
    """As `files_below`, with their absolute paths."""
    if not source.is_dir():
        yield os.path.abspath(source), source
        return

    def fail(error: OSError) -> None:
        raise error

    for folder, children, names in os.walk(source, onerror=fail):
        children[:] = sorted(name for name in children if not is_hidden(name))
        links = [name for name in children if os.path.islink(os.path.join(folder, name))]
        place, parent = os.path.join(os.path.abspath(folder), ""), Path(folder)
        yield from ((place + name, parent / name) for name in sorted([*names, *links]) if not is_hidden(name))


def _check_outputs(jobs: list[Job], folder: Path) -> None:
    """No output may be an input, under whatever name, or outside `folder`, and no two outputs the same file."""
    real = functools.lru_cache(maxsize=None)(os.path.realpath)
    root = real(folder)

    @functools.cache
    def inside(parent: str) -> bool:
        return os.path.commonpath([root, real(parent)]) == root

    inputs = {_identity(job.input, real)[0]: job.input for job in jobs}
    taken: dict[str, Path] = {}
    for job in jobs:
        parent, name = os.path.split(job.output)
        place = os.path.join(real(parent), name)
        if not inside(parent):
            raise ValueError(
                f"{str(job.output)!r} would be written outside the output folder, to {place!r}, through a link; "
                "remove the link or choose another output folder."
            )
        identity, is_link = _identity(job.output, real)
        end = os.path.realpath(place) if is_link else place
        clash = inputs.get(identity) or inputs.get(end)
        if clash is not None:
            what = f"{str(job.output)!r} would overwrite the input {str(clash)!r}"
            raise ValueError(f"{what}; choose another output folder.")
        other = taken.setdefault(end, job.input)
        if other != job.input:
            what = f"{str(other)!r} and {str(job.input)!r} would both be written to {str(job.output)!r}"
            raise ValueError(f"{what}; use --format keep.")


def _identity(path: Path, real: Callable[[str], str]) -> tuple[str, bool]:
    """Equal for two names of one file, hard links included; and whether the name is that of a link."""
    text = os.fspath(path)
    try:
        found = os.lstat(text)
    except OSError:  # not there, or too long a name: reading or writing it will say so
        parent, name = os.path.split(text)
        return os.path.join(real(parent), name), False
    is_link = stat.S_ISLNK(found.st_mode)
    try:
        found = os.stat(text) if is_link else found
    except OSError:  # a link to nothing, or a loop of links
        return os.path.realpath(text), True
    return f"{found.st_dev}:{found.st_ino}", is_link
