"""Zip and tar files, read member by member and written again: what is damaged, or should not be unpacked, is told."""

from __future__ import annotations

import contextlib
import gzip
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import PurePosixPath
from typing import IO, Any

from ernet_fast.scale.inputs import IMAGE_SUFFIXES, archive_suffix
from ernet_fast.scale.treat import Limits

_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, zlib.error, RuntimeError, NotImplementedError)
_Info = Any  # zipfile.ZipInfo or tarfile.TarInfo


class ArchiveError(ValueError):
    """An archive is damaged, or no archive."""


@dataclass(slots=True)
class Member:
    """A file in an archive: its place there, how many bytes it is said to have, and why it is not taken."""

    name: str
    info: _Info
    size: int
    refused: str = ""

    @property
    def is_image(self) -> bool:
        """Whether its name is that of an image which is read."""
        return PurePosixPath(self.name).suffix.lower() in IMAGE_SUFFIXES


class ZipArchive:
    """A zip file, read or written."""

    def __init__(self, file: IO[bytes], mode: Any, gz: bool) -> None:
        self.zip = zipfile.ZipFile(file, mode)

    def members(self) -> Iterator[Member]:
        """All members, folders too, in their order."""
        for info in self.zip.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            refused = "encrypted" if info.flag_bits & 1 else ""
            refused = "a link or device" if kind and not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)) else refused
            yield Member(info.filename, info, info.file_size, "folder" if info.is_dir() else refused)

    def open(self, member: Member) -> IO[bytes]:
        """The content of a member."""
        return self.zip.open(member.info)

    def write(self, name: str, info: _Info, size: int, content: Any) -> None:
        """Add a member of `size` bytes, with the time and rights of `info`."""
        if isinstance(info, tarfile.TarInfo):
            info = _zip_info(info)
        out = zipfile.ZipInfo(name, info.date_time)
        out.compress_type, out.external_attr, out.comment = info.compress_type, info.external_attr, info.comment
        with self.zip.open(out, "w", force_zip64=size >= 1 << 31) as file:
            shutil.copyfileobj(content, file, 1 << 20)

    def close(self) -> None:
        """End the archive; its file stays open."""
        self.zip.close()


class TarArchive:
    """A tar file, read or written, one member after the other."""

    def __init__(self, file: IO[bytes], mode: Any, gz: bool) -> None:
        self.gz = gz
        self.packed: Any = None
        if gz:  # fast: images hardly get smaller; no time and no name, so that the bytes are the same again
            self.packed = gzip.GzipFile("", f"{mode}b", 1, file, mtime=0)
        self.tar: tarfile.TarFile = tarfile.open(fileobj=self.packed or file, mode="r:" if mode == "r" else "w:")

    def members(self) -> Iterator[Member]:
        """All members, folders too, in their order."""
        for info in self.tar:
            plain = info.isreg() and not info.issparse()
            yield Member(info.name, info, info.size, "folder" if info.isdir() else "" if plain else "a link or device")
        self._check_end()

    def _check_end(self) -> None:
        """A tar file that was cut short between two members has no block of zeros at its end."""
        source: Any = self.tar.fileobj
        if self.gz:  # knows its own end, when it is read to there
            while source.read(1 << 20):
                pass
            return
        source.seek(self.tar.offset)
        if source.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ArchiveError("the tar file is truncated: it has no end")

    def open(self, member: Member) -> IO[bytes]:
        """The content of a member."""
        found = self.tar.extractfile(member.info)
        assert found is not None
        return found

    def write(self, name: str, info: _Info, size: int, content: Any) -> None:
        """Add a member of `size` bytes, with the time and rights of `info`."""
        if isinstance(info, zipfile.ZipInfo):
            info = _tar_info(info)
        out = tarfile.TarInfo(name)
        out.size, out.mtime, out.mode = size, info.mtime, info.mode
        out.uid, out.gid, out.uname, out.gname = info.uid, info.gid, info.uname, info.gname
        self.tar.addfile(out, content)

    def close(self) -> None:
        """End the archive; its file stays open."""
        self.tar.close()
        if self.packed is not None:
            self.packed.close()


def _zip_info(info: tarfile.TarInfo) -> zipfile.ZipInfo:
    """Time (UTC, from 1980 to 2107) and rights of a member of a tar file, which is stored: images get no smaller."""
    moment = datetime.fromtimestamp(info.mtime, timezone.utc).timetuple()[:6]
    out = zipfile.ZipInfo(info.name, min(max(moment, (1980, 1, 1, 0, 0, 0)), (2107, 12, 31, 23, 59, 58)))
    out.external_attr = (stat.S_IFREG | info.mode & 0o7777) << 16
    return out


def _tar_info(info: zipfile.ZipInfo) -> tarfile.TarInfo:
    """Time (taken for UTC) and rights of a member of a zip file."""
    out = tarfile.TarInfo(info.filename)
    with contextlib.suppress(ValueError):  # month 0: the zip file says no time
        out.mtime = int(datetime(*info.date_time, tzinfo=timezone.utc).timestamp())
    out.mode = info.external_attr >> 16 & 0o777 or out.mode
    return out


def open_archive(file: IO[bytes], name: str, mode: str) -> ZipArchive | TarArchive:
    """An open file as the archive that its `name` says, to "r" or "w"."""
    suffix = archive_suffix(name)
    return (ZipArchive if suffix == ".zip" else TarArchive)(file, mode, suffix in (".tar.gz", ".tgz"))


def checked_members(archive: ZipArchive | TarArchive, limits: Limits) -> Iterator[Member]:
    """The files of an archive, those that nobody should unpack marked as refused; folders are left out."""
    seen: set[str] = set()
    for member in archive.members():
        if member.refused == "folder":
            continue
        parts = PurePosixPath(member.name.replace("\\", "/")).parts
        if not parts or member.name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
            member.refused = "its name leads out of the archive's folder"
        elif member.name in seen:
            member.refused = "its name occurs twice in the archive"
        elif member.size > limits.bytes:
            member.refused = f"{member.size} bytes, more than the limit of {limits.bytes}"
        seen.add(member.name)
        yield member


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Errors of the readers of archives as ArchiveError: some of them are an OSError, as those of a full disk are."""
    try:
        yield
    except _DAMAGE as error:
        raise ArchiveError(f"the archive is damaged or of an unknown kind: {error}") from error


class Checked:
    """A member that is copied through, whose errors are those of reading."""

    def __init__(self, content: IO[bytes]) -> None:
        self.content = content

    def read(self, size: int = -1) -> bytes:
        """As of a file."""
        with reading():
            return self.content.read(size)


def each_member(archive: ZipArchive | TarArchive, limits: Limits) -> Iterator[Member]:
    """The files of an archive, as `checked_members`; ArchiveError where it is damaged."""
    members = checked_members(archive, limits)
    while True:
        with reading():
            member = next(members, None)
        if member is None:
            return
        yield member
