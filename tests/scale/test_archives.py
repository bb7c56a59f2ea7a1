"""Archives of images: the same members, normalised, in their order; nothing that should not be unpacked."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ernet_fast.data.image_io import decode
from ernet_fast.scale import Limits, archives, containers, normalize_files
from ernet_fast.stain import MacenkoNormalizer, macenko_fit, macenko_normalize

KINDS = [".zip", ".tar", ".tar.gz", ".tgz"]


def pack(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """An archive of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, data in members:
                file.writestr(zipfile.ZipInfo(name, (2001, 2, 3, 4, 5, 6)), data)
        return path
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 10**9
            file.addfile(info, io.BytesIO(data))
    return path


def unpack(path: Path) -> list[tuple[str, bytes]]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as file:
            assert file.testzip() is None
            return [(info.filename, file.read(info)) for info in file.infolist()]
    with tarfile.open(path) as file:
        return [(info.name, file.extractfile(info).read()) for info in file]


@pytest.fixture
def members(tmp_path: Path, write_patch) -> list[tuple[str, bytes]]:
    """Samples as WebDataset has them, and a large member that is no image."""
    found = []
    for number in range(5):
        data = write_patch(tmp_path / "patch.png", number, size=(32, 40)).read_bytes()
        found += [(f"deep/{number}.json", json.dumps({"n": number}).encode()), (f"deep/{number}.png", data)]
    found.insert(5, ("large.npy", os.urandom(archives.SMALL + 1)))
    return found


def expected(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    normalizer = MacenkoNormalizer(layout="HWC")
    return [(name, normalizer(decode(data)[0]) if name.endswith("png") else data) for name, data in members]


def check(path: Path, wanted: list[tuple[str, bytes]]) -> None:
    found = unpack(path)
    assert [name for name, _ in found] == [name for name, _ in wanted]
    for (name, data), (_, right) in zip(found, wanted, strict=True):
        assert np.array_equal(decode(data)[0], right) if name.endswith("png") else data == right


@pytest.mark.parametrize("kind", KINDS)
def test_members_keep_their_order(members, tmp_path, kind):
    source = pack(tmp_path / "in" / f"shard-000{kind}", members)
    before = source.read_bytes()
    summary = normalize_files(tmp_path / "in", tmp_path / "out", workers=3, status=tmp_path / "status.csv")
    check(tmp_path / "out" / source.name, expected(members))
    assert source.read_bytes() == before and summary.counts == {"ok": 5}
    assert [file.input for file in summary.files] == [f"{source}::deep/{number}.png" for number in range(5)]
    again = normalize_files(tmp_path / "in", tmp_path / "out", status=tmp_path / "again.csv")
    assert len(again.done_before) == 5 and (tmp_path / "again.csv").read_text() == (tmp_path / "status.csv").read_text()
    assert normalize_files(tmp_path / "in", tmp_path / "out", verify=True).counts == {"ok": 5}
    normalize_files(source, tmp_path / f"one{kind}", workers=1)
    assert (tmp_path / f"one{kind}").read_bytes() == (tmp_path / "out" / source.name).read_bytes()


def test_per_folder_is_per_archive(members, tmp_path):
    source = pack(tmp_path / "in" / "a.tar", members)
    normalize_files(source, tmp_path / "out.tar", fit="per-folder")
    pixels = [decode(data)[0] for name, data in members if name.endswith("png")]
    fit = macenko_fit(np.concatenate(pixels, axis=1), layout="HWC")
    found = [decode(data)[0] for name, data in unpack(tmp_path / "out.tar") if name.endswith("png")]
    for one, source_pixels in zip(found, pixels, strict=True):
        assert np.array_equal(one, macenko_normalize(source_pixels, MacenkoNormalizer().target, fit))


def test_another_format(members, tmp_path):
    twice = [*members, ("deep/0.jpg", b"")]
    normalize_files(pack(tmp_path / "a.zip", members), tmp_path / "out.zip", format="webp")
    names = [name for name, _ in unpack(tmp_path / "out.zip")]
    assert names == [name.replace(".png", ".webp") for name, _ in members]
    summary = normalize_files(pack(tmp_path / "b.zip", twice), tmp_path / "out2.zip", format="webp")
    (error,) = [file for file in summary.files if file.status == "error"]
    assert "another member is written as 'deep/0.webp'" in error.reason


class TestRefused:
    """By name, and without harm to the others."""

    @pytest.mark.parametrize("kind", [".zip", ".tar"])
    def test_names_that_lead_elsewhere(self, members, tmp_path, kind):
        bad = ["../up.png", "/root.png", "deep/../../up.png", "C:/windows.png"]
        image = members[1][1]
        source = pack(tmp_path / f"a{kind}", [*members, *((name, image) for name in bad)])
        summary = normalize_files(source, tmp_path / f"out{kind}")
        refused = {file.input.partition("::")[2]: file.reason for file in summary.files if file.status == "error"}
        assert set(refused) == set(bad) and all("leads out" in reason for reason in refused.values())
        check(tmp_path / f"out{kind}", expected(members))

    def test_links_devices_and_repeated_names(self, members, tmp_path):
        source = pack(tmp_path / "a.tar", [*members, members[1]])
        with tarfile.open(source, "a") as file:
            for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.LNKTYPE, "hard.png"), (tarfile.CHRTYPE, "dev")):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, "/etc/passwd"
                file.addfile(info)
        summary = normalize_files(source, tmp_path / "out.tar")
        refused = {file.input.partition("::")[2]: file.reason for file in summary.files if file.status == "error"}
        assert set(refused) == {"link.png", "hard.png", "dev", "deep/0.png"}
        assert "twice" in refused["deep/0.png"] and "link" in refused["hard.png"]
        check(tmp_path / "out.tar", expected(members))

    def test_bombs(self, members, tmp_path):
        with zipfile.ZipFile(pack(tmp_path / "a.zip", members), "a", zipfile.ZIP_DEFLATED) as file:
            file.writestr("bomb.png", bytes(1 << 24))
        summary = normalize_files(tmp_path / "a.zip", tmp_path / "out.zip", limits=Limits(bytes=1 << 22))
        (error,) = [file for file in summary.files if file.status == "error"]
        assert "16777216 bytes, more than the limit" in error.reason
        check(tmp_path / "out.zip", expected(members))

    def test_broken_images(self, members, tmp_path):
        source = pack(tmp_path / "a.tar", [*members, ("broken.png", b"\x89PNG")])
        summary = normalize_files(source, tmp_path / "out.tar")
        assert summary.counts == {"ok": 5, "error": 1}
        check(tmp_path / "out.tar", expected(members))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_a_truncated_archive_gives_no_output(members, tmp_path, kind, share):
    (tmp_path / "in").mkdir()
    whole = pack(tmp_path / f"whole{kind}", [one for one in members if one[0] != "large.npy"]).read_bytes()
    (tmp_path / "in" / f"cut{kind}").write_bytes(whole[: int(share * len(whole)) // 512 * 512])
    pack(tmp_path / "in" / "whole.zip", members)
    summary = normalize_files(tmp_path / "in", tmp_path / "out")
    assert summary.counts == {"ok": 5, "error": 1} and re.search("archive|tar|empty", summary.files[0].reason)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if "ernet" not in path.name) == ["whole.zip"]


def test_a_tar_file_that_ends_after_a_member_is_truncated(members, tmp_path):
    source = pack(tmp_path / "in" / "a.tar", members)
    with tarfile.open(source) as file:
        last = file.getmembers()[-1]
    os.truncate(source, last.offset)
    (status,) = normalize_files(tmp_path / "in", tmp_path / "out").files
    assert status.status == "error" and "has no end" in status.reason


def test_checksums_of_archives(members, tmp_path):
    source = pack(tmp_path / "in" / "a.tar", members)
    for before in (0, 5):
        os.utime(source, ns=(before, before))  # a copy, without its time
        assert len(normalize_files(tmp_path / "in", tmp_path / "out", checksum=True).done_before) == before
    pack(source, members[:4])
    os.utime(source, ns=(5, 5))
    assert not normalize_files(tmp_path / "in", tmp_path / "out", checksum=True).done_before
    check(tmp_path / "out" / "a.tar", expected(members[:4]))


def test_an_archive_without_images(tmp_path):
    pack(tmp_path / "in" / "a.zip", [("notes.txt", b"text")])
    (file,) = normalize_files(tmp_path / "in", tmp_path / "out").files
    assert file.status == "skipped" and "no image" in file.reason and not (tmp_path / "out" / "a.zip").exists()


def test_a_run_that_is_killed_in_an_archive(members, tmp_path, monkeypatch):
    for number in range(3):
        pack(tmp_path / "in" / f"{number}.tar", members)
    process = os.fork()
    if process == 0:
        real, left = containers.TarArchive.write, 14

        def write(*arguments: object) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*arguments)

        containers.TarArchive.write = write
        normalize_files(tmp_path / "in", tmp_path / "out")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    summary = normalize_files(tmp_path / "in", tmp_path / "out")
    assert len(summary.done_before) == 5 and summary.counts == {"ok": 15}
    normalize_files(tmp_path / "in", tmp_path / "whole")
    for number in range(3):
        assert (tmp_path / "out" / f"{number}.tar").read_bytes() == (tmp_path / "whole" / f"{number}.tar").read_bytes()
    shutil.rmtree(tmp_path / "whole")
    parts = [normalize_files(tmp_path / "in", tmp_path / "whole", shard=f"{i}/2").counts["ok"] for i in (1, 2)]
    assert sum(parts) == 15


@pytest.mark.parametrize(("kind", "other"), [(".zip", ".tar"), (".tar.gz", ".zip"), (".tar", ".tgz")])
def test_one_archive_becomes_one_of_another_kind(members, tmp_path, kind, other):
    source, out = pack(tmp_path / f"a{kind}", members), tmp_path / f"b{other}"
    assert normalize_files(source, out, workers=2).counts == {"ok": 5}
    check(out, expected(members))
    if other == ".zip":
        with zipfile.ZipFile(out) as file:
            assert {info.date_time for info in file.infolist()} == {(2001, 9, 9, 1, 46, 40)}, "1e9 seconds, as packed"
            assert {info.external_attr >> 16 & 0o777 for info in file.infolist()} == {0o644}
    elif kind == ".zip":
        with tarfile.open(out) as file:
            assert {info.mtime for info in file} == {981173106}, "2001-02-03 04:05:06"
