"""`normalize_files`: what is read, what is written, and what is said about it."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ernet_fast.console.progress import pace
from ernet_fast.data import image_io, read_image
from ernet_fast.scale import Limits, normalize_files
from ernet_fast.scale.encode import decoder
from ernet_fast.stain import (
    MacenkoNormalizer,
    ReinhardNormalizer,
    joined_fit,
    macenko_fit,
    macenko_normalize,
    reinhard_normalize,
)
from ernet_fast.stain.options import Options


def pixels(path: Path) -> np.ndarray:
    return image_io.read_pixels(path)


def images_below(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith("ernet-fast-normalize.")}


@pytest.fixture
def archive(tmp_path: Path, write_patch) -> Path:
    """Two slides of patches in four formats."""
    folder = tmp_path / "archive"
    write_patch(folder / "slide 1" / "a.png", 1)
    write_patch(folder / "slide 1" / "b.jpg", 2, quality=81, subsampling=2)
    write_patch(folder / "slide 2" / "c.tif", 3, compression="tiff_adobe_deflate")
    write_patch(folder / "slide 2" / "d.webp", 4, lossless=True)
    return folder


class TestInputs:
    def names(self, tmp_path: Path, *inputs: object, **options: object) -> list[str]:
        out = tmp_path / "out"
        normalize_files(list(map(str, inputs)), out, **options)
        return sorted(images_below(out))

    def test_structure_below_the_deepest_common_folder(self, archive, tmp_path):
        all_four = ["slide 1/a.png", "slide 1/b.jpg", "slide 2/c.tif", "slide 2/d.webp"]
        assert self.names(tmp_path, archive / "slide 1", archive / "slide 2") == all_four

    def test_files_and_base(self, archive, tmp_path):
        assert self.names(tmp_path, archive / "slide 1" / "a.png", base=tmp_path) == ["archive/slide 1/a.png"]
        with pytest.raises(ValueError, match="does not lie in the base folder"):
            normalize_files(archive, tmp_path / "other", base=archive / "slide 1")

    def test_patterns(self, archive, tmp_path):
        assert self.names(tmp_path, archive / "*" / "*.[jt]*") == ["slide 1/b.jpg", "slide 2/c.tif"]
        with pytest.raises(FileNotFoundError, match=r"nothing\.\*"):
            normalize_files(str(archive / "nothing.*"), tmp_path / "other")

    def test_a_name_with_pattern_characters_is_a_name(self, archive, tmp_path, write_patch):
        assert self.names(tmp_path, write_patch(tmp_path / "in" / "a[1].png")) == ["a[1].png"]

    def test_lists(self, archive, tmp_path):
        lines = [
            "# two files, one of them twice",
            "",
            *[str(archive / "slide 1" / "a.png")] * 2,
            str(archive / "*/c.*"),
        ]
        (tmp_path / "list.txt").write_text("\r\n".join(lines))
        assert self.names(tmp_path, f"@{tmp_path / 'list.txt'}") == ["slide 1/a.png", "slide 2/c.tif"]
        (tmp_path / "list.txt").write_text("gone.png\n")
        with pytest.raises(FileNotFoundError, match="gone.png.*list.txt"):
            normalize_files(f"@{tmp_path / 'list.txt'}", tmp_path / "other")

    def test_links_do_not_lead_outputs_elsewhere(self, archive, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "out" / "slide 1").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match="outside the output folder"):
            normalize_files(archive, tmp_path / "out")
        assert not list((tmp_path / "elsewhere").iterdir())


class TestFormats:
    def test_pixels_are_those_of_the_decoded_input(self, archive, tmp_path):
        summary = normalize_files(archive, tmp_path / "out")
        assert summary.counts == {"ok": 4}
        normalizer = MacenkoNormalizer(layout="HWC")
        for name in ("slide 1/a.png", "slide 2/c.tif", "slide 2/d.webp"):
            assert np.array_equal(pixels(tmp_path / "out" / name), normalizer(pixels(archive / name)))
        expected = io.BytesIO()
        image = Image.fromarray(normalizer(pixels(archive / "slide 1" / "b.jpg")))
        image.save(expected, "JPEG", quality=81, subsampling=2)
        with Image.open(tmp_path / "out" / "slide 1" / "b.jpg") as found:
            assert np.array_equal(np.asarray(found), np.asarray(Image.open(expected)))

    def test_compression_is_that_of_the_input(self, archive, tmp_path):
        normalize_files(archive, tmp_path / "out")
        with Image.open(tmp_path / "out" / "slide 2" / "c.tif") as found:
            assert found.info["compression"] == "tiff_adobe_deflate"
        assert b"VP8L" in (tmp_path / "out" / "slide 2" / "d.webp").read_bytes()[:64]

    @pytest.mark.parametrize(("format", "suffix"), [("png", "png"), ("jpeg", "jpg"), ("tiff", "tif"), ("webp", "webp")])
    def test_one_format_for_all(self, archive, tmp_path, format, suffix):
        files = normalize_files(archive, tmp_path / "out", format=format, quality=90).files
        assert [Path(file.output).name for file in files] == [f"{stem}.{suffix}" for stem in "abcd"]
        for file in files:
            with Image.open(file.output) as found:
                assert found.format == format.upper()

    @pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
    def test_metadata(self, tmp_path, write_patch, suffix):
        exif = Image.Exif()
        exif[0x0112], exif[0x010F] = 6, "Scanner"  # orientation, maker
        kept = {"exif": exif, "icc_profile": b"profile" * 20, "dpi": (300, 200)}
        source = write_patch(tmp_path / f"turned.{suffix}", 1, size=(32, 50), **kept)
        output = tmp_path / f"out.{suffix}"
        normalize_files(source, output)
        with Image.open(output) as found:
            assert found.size == (32, 50) and found.info["icc_profile"] == kept["icc_profile"]
            assert found.getexif().get(0x0112, 1) == 1, "the orientation is that of the pixels"
            if suffix != "webp":
                assert found.info["dpi"] == pytest.approx((200, 300), abs=0.01)
            if suffix != "tif":
                assert found.getexif()[0x010F] == "Scanner"
        assert pixels(output).shape == pixels(source).shape == (50, 32, 3)

    def test_a_resolution_that_jpeg_cannot_say_is_left_out(self, tmp_path, write_patch):
        normalize_files(write_patch(tmp_path / "a.png", dpi=(101600, 101600)), tmp_path / "a.jpg")
        with Image.open(tmp_path / "a.jpg") as found:
            assert found.info.get("dpi", (72, 72)) == (72, 72)

    def test_grey_jpeg(self, tmp_path, write_patch):
        Image.open(write_patch(tmp_path / "a.png")).convert("L").save(tmp_path / "grey.jpg", quality=80)
        (file,) = normalize_files(tmp_path / "grey.jpg", tmp_path / "out.jpg").files
        assert file.status == "degenerate" and "on one line" in file.reason
        assert pixels(tmp_path / "out.jpg").shape == (40, 48, 3)


class TestLimits:
    """What is refused is named, and the others are done."""

    def test_size_and_truncation(self, archive, tmp_path, write_patch):
        write_patch(archive / "large.png", 5, size=(64, 64))
        whole = (archive / "slide 2" / "d.webp").read_bytes()
        (archive / "cut.webp").write_bytes(whole[: len(whole) // 2])
        summary = normalize_files(archive, tmp_path / "out", limits=Limits(pixels=2000))
        reasons = {Path(file.input).name: file.reason for file in summary.files if file.status == "error"}
        assert summary.counts == {"ok": 4, "error": 2}
        assert "64x64 pixels, more than 2000" in reasons["large.png"] and "truncated" in reasons["cut.webp"]
        size = (archive / "large.png").stat().st_size
        summary = normalize_files(archive, tmp_path / "out2", limits=Limits(bytes=size - 1))
        reasons = {Path(file.input).name: file.reason for file in summary.files if file.status == "error"}
        assert f"{size} bytes, more than the limit" in reasons["large.png"]

    def test_limits_that_make_no_sense(self):
        for wrong in ({"pixels": 0}, {"bytes": -1}, {"transparent": "black"}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                Limits(**wrong)

    @pytest.mark.parametrize("transparent", ["refuse", "white", "drop"])
    def test_transparent_pixels(self, tmp_path, write_patch, transparent):
        image = Image.open(write_patch(tmp_path / "a.png")).convert("RGBA")
        alpha = np.full((40, 48), 255, np.uint8)
        alpha[:10] = 0
        image.putalpha(Image.fromarray(alpha))
        image.save(tmp_path / "alpha.png")
        limits = Limits(transparent=transparent)
        (file,) = normalize_files(tmp_path / "alpha.png", tmp_path / "out.png", limits=limits).files
        if transparent == "refuse":
            assert file.status == "error" and "transparent" in file.reason
            return
        expected = pixels(tmp_path / "a.png")
        if transparent == "white":
            expected[:10] = 255
        assert np.array_equal(pixels(tmp_path / "out.png"), MacenkoNormalizer(layout="HWC")(expected))


class TestTargets:
    def normalizer(self, tmp_path, write_patch, **options):
        return MacenkoNormalizer(layout="CHW", **options).fit(read_image(write_patch(tmp_path / "target.png", 7)))

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    def test_saved_stains_bring_their_constants(self, archive, tmp_path, write_patch, suffix):
        normalizer = self.normalizer(tmp_path, write_patch, Io=235, beta=0.2, percentile="nearest")
        saved = tmp_path / f"target{suffix}"
        if suffix == ".pt":
            torch.save(normalizer.state_dict(), saved)
        else:
            from safetensors.torch import save_file

            save_file(normalizer.state_dict(), saved)
        source = archive / "slide 1" / "a.png"
        normalize_files(source, tmp_path / "out.png", target=saved)
        assert torch.equal(read_image(tmp_path / "out.png"), normalizer(read_image(source)))
        with pytest.raises(ValueError, match="fitted with Io=235.0, but Io=240.0"):
            normalize_files(source, tmp_path / "out.png", target=saved, options=Options(), overwrite=True)

    def test_fits(self, archive, tmp_path, write_patch):
        normalizer = self.normalizer(tmp_path, write_patch)
        source = archive / "slide 1" / "a.png"
        for name, target in (("a", tmp_path / "target.png"), ("b", normalizer.target)):
            normalize_files(source, tmp_path / f"{name}.png", target=target)
            assert torch.equal(read_image(tmp_path / f"{name}.png"), normalizer(read_image(source)))

    def test_what_is_no_target(self, archive, tmp_path):
        (tmp_path / "broken.safetensors").write_bytes(b"broken")
        torch.save(ReinhardNormalizer().state_dict(), tmp_path / "reinhard.pt")
        for target, message in (
            ("broken.safetensors", "cannot be read as saved stains"),
            ("reinhard.pt", "needs HERef, maxCRef"),
        ):
            with pytest.raises(ValueError, match=message):
                normalize_files(archive, tmp_path / "out", target=tmp_path / target)
        with pytest.raises(FileNotFoundError, match="no file of saved stains"):
            normalize_files(archive, tmp_path / "out", target=tmp_path / "gone.pt")
        with pytest.raises(ValueError, match="no target is published"):
            normalize_files(archive, tmp_path / "out", method="reinhard")
        assert not (tmp_path / "out").exists()


class TestFits:
    @pytest.mark.parametrize("joined", [1 << 23, 2000], ids=["one image", "counted colours"])
    def test_per_folder_is_the_fit_of_all_its_pixels(self, archive, tmp_path, monkeypatch, joined):
        monkeypatch.setattr(joined_fit, "JOINED_PIXELS", joined)
        (archive / "slide 1" / "broken.png").write_bytes(b"")
        summary = normalize_files(archive, tmp_path / "out", fit="per-folder", format="png")
        parts = [pixels(archive / "slide 1" / name).reshape(1, -1, 3) for name in ("a.png", "b.jpg")]
        fit = macenko_fit(np.concatenate(parts, axis=1), layout="HWC")
        for name in ("a.png", "b.jpg"):
            out = (tmp_path / "out" / "slide 1" / name).with_suffix(".png")
            expected = macenko_normalize(pixels(archive / "slide 1" / name), MacenkoNormalizer().target, fit)
            assert np.array_equal(pixels(out), expected)
        one, two, three = (summary.files[i].stains for i in (0, 1, 3))
        assert one == two != three and one[:3] == tuple(fit.stain_matrix[0, :, 0].tolist())
        assert summary.counts == {"ok": 4, "error": 1}

    def test_fixed(self, archive, tmp_path):
        source = archive / "slide 1" / "a.png"
        summary = normalize_files(archive, tmp_path / "out", fit="fixed", source=source)
        fit = macenko_fit(pixels(source))
        expected = macenko_normalize(pixels(archive / "slide 2" / "c.tif"), MacenkoNormalizer().target, fit)
        assert np.array_equal(pixels(tmp_path / "out" / "slide 2" / "c.tif"), expected)
        assert len({file.stains for file in summary.files}) == 1
        for options in ({"fit": "fixed"}, {"source": source}):
            with pytest.raises(ValueError, match="takes the stains of all images from a source"):
                normalize_files(archive, tmp_path / "other", **options)

    @pytest.mark.parametrize("fit", ["per-image", "per-folder", "fixed"])
    def test_reinhard(self, archive, tmp_path, write_patch, fit):
        target = write_patch(tmp_path / "target.png", 7)
        options = {"source": archive / "slide 1" / "a.png"} if fit == "fixed" else {}
        out = tmp_path / "out"
        summary = normalize_files(archive, out, method="reinhard", target=target, fit=fit, format="png", **options)
        assert summary.counts == {"ok": 4} and summary.columns[0] == "mean_l"
        from ernet_fast.stain import reinhard_fit

        own = [pixels(archive / "slide 1" / name) for name in ("a.png", "b.jpg")]
        source = {"per-image": own[1], "per-folder": np.concatenate(own, axis=1), "fixed": own[0]}[fit]
        known = reinhard_fit(source, layout="HWC")
        expected = reinhard_normalize(own[1], reinhard_fit(pixels(target)), known)
        # two ways to sum up the pixels of a folder
        assert np.abs(pixels(out / "slide 1" / "b.png").astype(int) - expected).max() <= (fit == "per-folder")
        assert summary.files[1].stains[:3] == pytest.approx(known.mean[0].tolist(), rel=1e-12)


class TestStatus:
    def test_table(self, archive, tmp_path):
        Image.new("RGB", (20, 10), (245, 245, 245)).save(archive / "white.png")
        (archive / 'broken, "quoted".png').write_bytes(b"")
        table = tmp_path / "status.csv"
        summary = normalize_files(archive, tmp_path / "out", status=table)
        with open(table, newline="", encoding="utf-8") as file:
            rows = {Path(row["input"]).name: row for row in csv.DictReader(file)}
        assert [rows[Path(file.input).name]["status"] for file in summary.files] == [f.status for f in summary.files]
        fit = macenko_fit(pixels(archive / "slide 1" / "a.png"))
        row = rows["a.png"]
        assert [float(row[f"eosin_{c}"]) for c in "rgb"] == fit.stain_matrix[0, :, 1].tolist()
        assert float(row["max_haematoxylin"]) == float(fit.max_concentration[0, 0])
        dense = -np.log((pixels(archive / "slide 1" / "a.png") + 1.0) / 240) >= 0.15
        assert float(row["tissue_share"]) == dense.all(axis=2).mean()
        assert (row["width"], row["height"], row["reason"]) == ("48", "40", "")
        white = rows["white.png"]
        assert white["status"] == "degenerate" and "fewer than" in white["reason"]
        assert white["haematoxylin_r"] == "" and float(white["tissue_share"]) == 0
        assert rows['broken, "quoted".png']["status"] == "error" and rows['broken, "quoted".png']["output"] == ""

    def test_only_csv(self, archive, tmp_path):
        with pytest.raises(ValueError, match="ends in .csv"):
            normalize_files(archive, tmp_path / "out", status="status.xlsx")
        assert not (tmp_path / "out").exists()


def test_order_and_workers_change_nothing(archive, tmp_path):
    first = normalize_files(archive, tmp_path / "1", workers=1)
    folders = [archive / "slide 2", archive / "slide 1"]
    other = normalize_files(folders, tmp_path / "2", workers=3)
    assert images_below(tmp_path / "1") == images_below(tmp_path / "2")
    assert [(f.input, f.stains, f.sha256) for f in first.files] == [(f.input, f.stains, f.sha256) for f in other.files]


def test_nonsense_is_refused_by_name(archive, tmp_path):
    for options in ({"fit": "x"}, {"format": "bmp"}, {"quality": 0}, {"workers": 0}, {"method": "vahadane"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            normalize_files(archive, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_decoder_is_named():
    assert decoder().startswith("Pillow ")


def test_pace():
    assert pace(100, 1000, 50) == "2/s, 7 min 30 s left"
    assert pace(1, 20_000, 1) == "1/s, 5 h 33 min left" and pace(5, 10, 5) == "1/s, 5 s left"


def test_zarr(archive, tmp_path):
    zarr = pytest.importorskip("zarr")
    out, plain = tmp_path / "out", tmp_path / "plain"
    summary = normalize_files(archive, out, format="zarr")
    normalize_files(archive, plain, format="png")
    assert summary.counts == {"ok": 4}
    for name in ("slide 1/a", "slide 2/d"):
        group = zarr.open_group(zarr.storage.ZipStore(out / f"{name}.zarr.zip", read_only=True), mode="r")
        assert np.array_equal(np.moveaxis(group["0"][:], 0, 2), pixels(plain / f"{name}.png"))
    assert len(normalize_files(archive, out, format="zarr").done_before) == 4
    single = normalize_files(archive / "slide 1" / "a.png", tmp_path / "one.zarr.zip")
    assert single.files[0].sha256 == summary.files[0].sha256
