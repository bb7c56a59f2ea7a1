from __future__ import annotations

import csv
import json

import numpy as np
import pytest

pytest.importorskip("skimage", reason="scikit-image (extra segment) is not installed")

from PIL import Image

from ernet_fast.cli import main
from ernet_fast.data.synthetic import generate_patch
from ernet_fast.segment import nuclei, segment_files


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "in"
    (place / "deep").mkdir(parents=True)
    for name, seed in (("SOB_M_DC-14-90001-200-001.png", 1), ("deep/SOB_M_DC-14-90001-100-002.png", 2)):
        patch = generate_patch("DC", magnification=200 if seed == 1 else 100, size=(92, 140), seed=seed)
        Image.fromarray(patch.image.transpose(1, 2, 0).copy()).save(place / name)
    return place


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_tables_overlays_and_settings(folder, tmp_path):
    out = tmp_path / "out"
    assert main(["segment", str(folder), "--out", str(out), "--mpp", "breakhis", "--contrast", "0.12", "--quiet"]) == 0
    images, each = rows(out / "images.csv"), rows(out / "nuclei.csv")
    assert len(images) == 2 and sum(int(row["nuclei"]) for row in images) == len(each) > 20
    assert [float(row["mpp_y"]) for row in images] == pytest.approx([0.33 * 5, 0.66 * 5])
    assert {row["image"] for row in each} == {"SOB_M_DC-14-90001-200-001.png", "deep/SOB_M_DC-14-90001-100-002.png"}
    pixels = np.asarray(Image.open(folder / "SOB_M_DC-14-90001-200-001.png"))
    found = nuclei(pixels, mpp=1.65, settings=None)
    first = [row for row in each if row["image"] == images[0]["image"].split("/")[-1]]
    assert len(first) <= found.count
    overlay = np.asarray(Image.open(out / "overlays" / "deep" / "SOB_M_DC-14-90001-100-002.png.png"))
    assert overlay.shape == (92 * 5, 140 * 5, 3)
    record = json.loads((out / "segment.json").read_text())
    assert record["mpp"] == "breakhis" and record["settings"]["contrast"] == 0.12


def test_files_that_cannot_be_read_stop_no_other(folder, tmp_path, capsys):
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "old.bmp").write_bytes(b"BM")
    code = main(["segment", str(folder), "--out", str(tmp_path / "o"), "--mpp", "1.65", "--no-overlays", "--json"])
    done = json.loads(capsys.readouterr().out)
    assert code == 3 and [entry["reason"] is None for entry in done] == [True, False, True, False]
    assert "truncated" in done[1]["reason"] and ".bmp" in done[3]["reason"]
    assert not (tmp_path / "o" / "overlays").exists() and len(rows(tmp_path / "o" / "images.csv")) == 4


def test_breakhis_sizes_need_a_breakhis_name(tmp_path):
    Image.fromarray(np.full((40, 40, 3), 200, np.uint8)).save(tmp_path / "x.png")
    (entry,) = segment_files([tmp_path / "x.png"], tmp_path / "out", mpp="breakhis")
    assert entry.figures is None and "does not parse" in entry.reason
    with pytest.raises(ValueError, match="mpp='micro'"):
        segment_files([tmp_path / "x.png"], tmp_path / "out", mpp="micro")
