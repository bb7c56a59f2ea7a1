"""`--fit per-slide`: the slides of images are found in their names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ernet_fast.cli import main
from ernet_fast.data.image_io import read_pixels
from ernet_fast.scale import normalize_files, write_tables
from ernet_fast.stain import macenko_fit

PATTERN = r"(slide\d+)_\d+"


@pytest.fixture
def archive(tmp_path: Path, write_patch) -> Path:
    """Two slides, whose patches lie in folders of tumour and stroma."""
    for number in range(8):
        folder = "tumour" if number < 3 else "stroma"
        write_patch(tmp_path / "in" / folder / f"slide{number % 2}_{number}.png", number)
    return tmp_path / "in"


def test_images_of_a_slide_are_fitted_together(archive, tmp_path):
    out = tmp_path / "out"
    summary = normalize_files(archive, out, fit="per-slide", slide_pattern=PATTERN)
    assert summary.counts == {"ok": 8}
    for slide in ("slide0", "slide1"):
        own = [file for file in summary.files if slide in file.input]
        pixels = np.concatenate([read_pixels(file.input).reshape(1, -1, 3) for file in own], axis=1)
        right = macenko_fit(pixels, layout="HWC").stain_matrix[0]
        assert len(own) == 4 and {file.stains for file in own} == {own[0].stains}
        assert own[0].stains[:3] == tuple(right[:, 0].tolist())
    assert {path.parent.name for path in out.rglob("*.png")} == {"tumour", "stroma"}


def test_a_changed_image_changes_its_slide(archive, tmp_path, write_patch):
    out = tmp_path / "out"
    options = {"fit": "per-slide", "slide_pattern": PATTERN}
    normalize_files(archive, out, **options)
    write_patch(archive / "stroma" / "slide1_7.png", 99)
    again = normalize_files(archive, out, **options)
    assert {Path(name).name[:6] for name in again.done_before} == {"slide0"}
    with pytest.raises(ValueError, match="slide_pattern was"):
        normalize_files(archive, out, fit="per-slide", slide_pattern="slide.")


def test_slides_are_not_divided_among_shards(archive, tmp_path):
    whole = normalize_files(archive, tmp_path / "whole", fit="per-slide", slide_pattern=PATTERN)
    files = []
    for number in (1, 2, 3):
        command = ["normalize", str(archive), str(tmp_path / "out"), "--fit", "per-slide", "--slide-pattern", PATTERN]
        part = [*command, "--quiet", "--shard", f"{number}/3", "--status", str(tmp_path / "s.csv")]
        assert main(part) == 0
        files.append((tmp_path / f"s.{number}-of-3.csv").read_text().splitlines()[1:])
    assert sorted(map(len, files))[0] == 0 and sum(map(len, files)) == 8
    for lines in files:
        assert len(lines) % 4 == 0, "a slide is on one machine"
    for file in whole.files:
        name = Path(file.input).relative_to(archive)
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_table_a_slide(archive, tmp_path):
    tables = write_tables(archive, tmp_path / "luts", fit="per-slide", slide_pattern=PATTERN)
    assert sorted((table.name, table.images, table.status) for table in tables) == [
        ("slide0", 4, "ok"),
        ("slide1", 4, "ok"),
    ]
    assert sorted(path.name for path in (tmp_path / "luts").iterdir()) == [
        "slide0.cube", "slide0.icc", "slide1.cube", "slide1.icc",
    ]  # fmt: skip


def test_what_makes_no_sense(archive, tmp_path, write_patch):
    for options, message in (
        ({"fit": "per-slide"}, "--slide-pattern"),
        ({"slide_pattern": PATTERN}, "--slide-pattern"),
        ({"fit": "per-slide", "slide_pattern": "("}, "no regular expression"),
        ({"fit": "per-slide", "slide_pattern": "patient"}, "finds no slide in the name"),
    ):
        with pytest.raises(ValueError, match=message):
            normalize_files(archive, tmp_path / "out", **options)
    (archive / "more.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="use fit='per-folder'"):
        normalize_files(archive, tmp_path / "out", fit="per-slide", slide_pattern=PATTERN)
    assert not (tmp_path / "out").exists()
