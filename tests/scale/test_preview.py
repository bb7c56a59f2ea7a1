"""The contact sheet shows the images whose stains are unlike the others'."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ernet_fast.scale import FileStatus, Summary, normalize_files
from ernet_fast.scale.method import MacenkoMethod
from ernet_fast.scale.preview import OUTLIERS, TYPICAL, chosen, deviations, thumbnails


def status(name: str, stains: tuple[float, ...], output: str | None = "out") -> FileStatus:
    return FileStatus(name, output, "ok", stains=stains)


def turned(degrees: float) -> tuple[float, ...]:
    """Stains whose eosin is turned away by an angle."""
    angle = np.radians(degrees)
    return (0.6, 0.7, 0.3873, float(np.cos(angle)), float(np.sin(angle)), 0.0, 2.0, 1.0)


def test_the_farthest_come_first():
    files = [status(f"{number:02}", turned(0.01 * number)) for number in range(50)]
    files += [
        status("odd", turned(20)),
        status("odder", turned(-30)),
        status("lost", turned(80), None),
        status("white", ()),
    ]
    summary = Summary(files, MacenkoMethod.columns)
    found = deviations(summary)
    assert [one.file.input for one in found[:2]] == ["odder", "odd"] and len(found) == 52
    assert found[0].value == pytest.approx(30.25, abs=0.1) and "eosin 30.2" in found[0].shown
    outliers, others = chosen(summary).values()
    assert len(outliers) == OUTLIERS and len(others) == TYPICAL
    assert not {one.file.input for one in outliers} & {one.file.input for one in others}


def test_the_sheet(tmp_path, write_patch):
    for number in range(5):
        write_patch(tmp_path / "in" / f"{number}.png", number, size=(40, 60))
    write_patch(tmp_path / "in" / "ünïcödé ☃.png", 9)
    normalize_files(tmp_path / "in", tmp_path / "out", preview=tmp_path / "preview.png")
    with Image.open(tmp_path / "preview.png") as sheet:
        assert sheet.mode == "RGB" and sheet.width > 1000
        before = np.asarray(Image.open(tmp_path / "in" / "0.png"))
        pixels = np.asarray(sheet)
    places = np.argwhere((pixels[:-39, :-59] == before[0, 0]).all(axis=2))
    assert any(np.array_equal(pixels[y : y + 40, x : x + 60], before) for y, x in places), (
        "small images are shown as they are"
    )
    first = (tmp_path / "preview.png").read_bytes()
    normalize_files(tmp_path / "in", tmp_path / "out", preview=tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == first, "what was done before is shown too"


def test_members_of_archives(tmp_path, write_patch):
    import zipfile

    patch = write_patch(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.write(patch, "deep/a.png")
    found = thumbnails([f"{tmp_path}/a.zip::deep/a.png", f"{tmp_path}/a.zip::gone.png", f"{tmp_path}/gone.png"])
    assert list(found) == [f"{tmp_path}/a.zip::deep/a.png"]
    assert np.array_equal(np.asarray(found.popitem()[1]), np.asarray(Image.open(patch)))


def test_nothing_to_show_and_other_suffixes(tmp_path):
    Image.new("RGB", (20, 20), "white").save(tmp_path / "white.png")
    normalize_files(tmp_path / "white.png", tmp_path / "out", preview=tmp_path / "preview.jpg")
    assert Image.open(tmp_path / "preview.jpg").format == "JPEG"
    with pytest.raises(ValueError, match="ends in .png"):
        normalize_files(tmp_path / "white.png", tmp_path / "out2", preview=Path("preview.pdf"))
