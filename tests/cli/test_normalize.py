"""Normalising files: right pixels, no input harmed, every file accounted for."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ernet_fast.data import read_image
from ernet_fast.data.synthetic import generate_patch
from ernet_fast.scale import encode
from ernet_fast.scale.journal import journal_of
from ernet_fast.scale.run_folder import NAME as RECORD
from ernet_fast.stain import MacenkoNormalizer

JOURNAL = journal_of(Path()).name


def write_patch(path: Path, seed: int, size=(48, 40), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = generate_patch("DC", size=size, seed=seed).image
    Image.fromarray(np.ascontiguousarray(np.transpose(pixels, (1, 2, 0)))).save(path, **options)
    return path


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "in"
    write_patch(folder / "a.png", 1)
    write_patch(folder / "deep" / "er" / "b.jpg", 2, quality=95)
    write_patch(folder / "deep" / "c.png", 3, size=(33, 57))
    return folder


def test_folder(call, images, tmp_path):
    before = digests(images)
    called = call("normalize", images, tmp_path / "out")
    assert called.code == 0 and "3 normalised; written to" in called.out
    assert sorted(digests(tmp_path / "out")) == sorted([*before, RECORD, JOURNAL]), (
        "the structure is kept and nothing else left"
    )
    assert digests(images) == before
    expected = MacenkoNormalizer(layout="CHW")(read_image(images / "deep" / "c.png"))
    assert torch.equal(read_image(tmp_path / "out" / "deep" / "c.png"), expected)


def test_one_file_and_a_target(call, images, tmp_path):
    target = write_patch(tmp_path / "target.png", 9)
    called = call(
        "normalize", images / "a.png", tmp_path / "out", "--target", target, "--percentile", "nearest", "--beta", 0.2
    )
    assert called.code == 0
    normalizer = MacenkoNormalizer(percentile="nearest", beta=0.2, layout="CHW").fit(read_image(target))
    assert torch.equal(read_image(tmp_path / "out" / "a.png"), normalizer(read_image(images / "a.png")))


def test_workers_do_not_change_the_pixels(call, images, tmp_path):
    for workers in (1, 3):
        assert call("normalize", images, tmp_path / f"out{workers}", "--workers", workers).code == 0
    written = [digests(tmp_path / f"out{workers}") for workers in (1, 3)]
    for found in written:
        del found[JOURNAL]  # in the order in which they were done
    assert written[0] == written[1]


def test_default_target_is_the_published_one():
    """HERef and maxCRef of torchstain, and of the MATLAB code before it."""
    torchstain = pytest.importorskip("torchstain")
    published = torchstain.normalizers.MacenkoNormalizer(backend="numpy")
    own = MacenkoNormalizer()
    assert np.array_equal(own.HERef.numpy(), published.HERef) and np.array_equal(own.maxCRef.numpy(), published.maxCRef)


def test_existing_outputs_are_kept_unless_told(call, images, tmp_path):
    out = tmp_path / "out"
    assert call("normalize", images, out).code == 0
    (out / "a.png").write_bytes(b"precious")
    (out / "deep" / "c.png").unlink()
    called = call("normalize", images, out)
    assert called.code == 0 and (out / "a.png").read_bytes() == b"precious"
    assert (
        "skipped" in called.out
        and "--overwrite" in called.out
        and "1 normalised, 1 skipped, 1 done before" in called.out
    )
    assert call("normalize", images, out, "--overwrite").code == 0
    assert read_image(out / "a.png").shape == (3, 48, 40)


def test_a_corrupt_image_fails_alone(call, images, tmp_path):
    whole = (images / "a.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    (images / "empty.jpg").write_bytes(b"")
    called = call("normalize", images, tmp_path / "out", "--json")
    files = {Path(entry["input"]).name: entry for entry in called.json["files"]}
    assert called.code == 3 and called.json["counts"] == {"failed": 2, "normalised": 3}
    assert "truncated" in files["cut.png"]["reason"] and "empty" in files["empty.jpg"]["reason"]
    assert not (tmp_path / "out" / "cut.png").exists()
    table = call("normalize", images, tmp_path / "out2")
    assert table.code == 3 and "failed" in table.out and "cut.png" in table.out and "Traceback" not in table.err


@pytest.mark.parametrize(
    ("policy", "code", "status"),
    [("reference", 0, "degenerate"), ("identity", 0, "degenerate"), ("raise", 3, "failed")],
)
def test_background_tiles(call, images, tmp_path, policy, code, status):
    Image.new("RGB", (20, 20), (245, 245, 245)).save(images / "white.png")
    called = call("normalize", images, tmp_path / "out", "--on-degenerate", policy, "--json")
    entry = next(entry for entry in called.json["files"] if entry["input"].endswith("white.png"))
    assert called.code == code and entry["status"] == status and "fewer than" in entry["reason"]
    written = tmp_path / "out" / "white.png"
    assert written.exists() == (policy != "raise")
    if policy == "identity":
        assert torch.equal(read_image(written), read_image(images / "white.png"))
    assert called.json["counts"]["normalised"] == 3, "one bad tile never changes another's result"


def test_other_pictures_are_listed_and_other_files_ignored(call, images, tmp_path):
    (images / "slide.svs").write_bytes(b"II*\0")
    (tmp_path / "elsewhere").mkdir()
    (images / "link").symlink_to(tmp_path / "elsewhere")
    (images / "notes.txt").write_text("hello")
    (images / ".hidden.png").write_bytes(b"x")
    called = call("normalize", images, tmp_path / "out", "--json")
    assert called.code == 0 and called.json["counts"] == {"normalised": 3, "skipped": 2}
    reasons = {Path(e["input"]).name: e["reason"] for e in called.json["files"] if e["status"] == "skipped"}
    assert "only PNG, JPEG, TIFF or WebP" in reasons["slide.svs"] and "link to a folder" in reasons["link"]


def test_png_format(call, images, tmp_path):
    assert call("normalize", images, tmp_path / "out", "--format", "png").code == 0
    assert (tmp_path / "out" / "deep" / "er" / "b.png").read_bytes().startswith(b"\x89PNG")
    write_patch(images / "a.jpg", 4)
    called = call("normalize", images, tmp_path / "out2", "--format", "png")
    assert called.code == 2 and "would both be written" in called.err and not (tmp_path / "out2").exists()


class TestInputsAreSafe:
    """Whatever the folders are called, no input is written to."""

    def refused(self, call, images, source, folder, message="choose", *options):
        before = digests(images)
        called = call("normalize", source, folder, "--overwrite", *options)
        assert called.code == 2 and message in called.err and digests(images) == before

    def test_same_folder(self, call, images):
        self.refused(call, images, images, images)
        self.refused(call, images, images, images / "deep" / "..")
        self.refused(call, images, images / "a.png", images)

    def test_folder_inside(self, call, images):
        self.refused(call, images, images, images / "out")

    def test_through_a_link(self, call, images, tmp_path):
        (tmp_path / "link").symlink_to(images)
        self.refused(call, images, images, tmp_path / "link")
        self.refused(call, images, tmp_path / "link", images)

    def test_output_above(self, call, tmp_path):
        """in/in/x.png written below the folder above in/ would land on the input in/x.png."""
        folder = tmp_path / "in"
        write_patch(folder / "x.png", 1)
        write_patch(folder / "in" / "x.png", 2)
        self.refused(call, folder, folder, tmp_path, "would overwrite the input")

    def test_hard_link(self, call, images, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        os.link(images / "a.png", out / "a.png")
        self.refused(call, images, images, out, "would overwrite the input")

    def test_link_to_an_input(self, call, images, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        (out / "a.png").symlink_to(images / "a.png")
        self.refused(call, images, images, out, "would overwrite the input")


def test_output_that_is_a_file(call, images, tmp_path):
    (tmp_path / "file").write_text("x")
    called = call("normalize", images, tmp_path / "file")
    assert called.code == 2 and "is a file" in called.err


def test_no_images(call, tmp_path):
    (tmp_path / "in").mkdir()
    called = call("normalize", tmp_path / "in", tmp_path / "out")
    assert called.code == 2 and "no PNG, JPEG, TIFF or WebP image" in called.err


@pytest.mark.parametrize("options", [["--beta", "-1"], ["--Io", "0"], ["--alpha", "50"], ["--workers", "0"]])
def test_wrong_parameters(call, images, tmp_path, options):
    called = call("normalize", images, tmp_path / "out", *options)
    assert called.code == 2 and options[0].strip("-") in called.err and not (tmp_path / "out").exists()


def test_a_target_without_tissue(call, images, tmp_path):
    Image.new("RGB", (20, 20), "white").save(tmp_path / "white.png")
    called = call("normalize", images, tmp_path / "out", "--target", tmp_path / "white.png")
    assert called.code == 2 and "white.png" in called.err and "cannot be fitted" in called.err


def test_a_full_disk_leaves_no_half_file(call, images, tmp_path, monkeypatch):
    class Full:
        def __init__(self, image):
            self.image = image

        def save(self, file, **options):
            file.write(b"half")
            raise OSError(28, "No space left on device", "x.png")

    real = encode.require

    class Pil:
        @staticmethod
        def fromarray(pixels):
            return Full(pixels)

    def require(module, **options):
        return Pil if options["purpose"] == "writing images" else real(module, **options)

    monkeypatch.setattr(encode, "require", require)
    called = call("normalize", images, tmp_path / "out")
    assert called.code == 1 and "No space left on device" in called.err
    assert "stopped after 0 of 3 files" in called.err and sorted(digests(tmp_path / "out")) == [JOURNAL, RECORD]


@pytest.mark.gpu
def test_the_command_on_a_gpu_writes_the_same_images(call, images, tmp_path):
    write_patch(images / "d.png", 5)
    Image.new("RGB", (20, 20), (245, 245, 245)).save(images / "white.png")
    (images / "cut.png").write_bytes((images / "a.png").read_bytes()[:100])
    for device in ("cpu", "cuda"):
        options = ("--device", device, "--format", "png", "--json")
        assert call("normalize", images, tmp_path / device, *options).code == 3
    for path in sorted((tmp_path / "cpu").rglob("*.png")):
        found = tmp_path / "cuda" / path.relative_to(tmp_path / "cpu")
        pair = [np.asarray(Image.open(one)).astype(int) for one in (path, found)]
        assert np.abs(pair[0] - pair[1]).max() <= 1 and (pair[0] != pair[1]).mean() <= 5e-4
