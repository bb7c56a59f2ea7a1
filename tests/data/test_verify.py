from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ernet_fast.cli import main
from ernet_fast.data import published as table
from ernet_fast.data.layout import find_tree, image_path
from ernet_fast.data.verify import verify_data


@pytest.fixture
def sound(tmp_path):
    """Six images of three patients, all different; returns the tree."""
    rng = np.random.default_rng(0)
    tree = tmp_path / "BreaKHis_v1" / "histology_slides"
    for code, slide in (("A", "14-1"), ("DC", "14-2AB"), ("LC", "14-2CD")):
        for magnification in (40, 200):
            path = image_path(tree, code, slide, magnification, "001")
            path.parent.mkdir(parents=True)
            Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).save(path)
    return tree


def test_the_published_counts(published):
    found = {code: {m: 0 for m in row} for code, row in table.IMAGES.items()}
    for sample in published:
        found[sample.subtype][sample.magnification] += 1
    assert found == table.IMAGES
    assert sum(sum(row.values()) for row in table.IMAGES.values()) == 7909


def test_a_sound_part_of_the_data_set(sound):
    found = verify_data(sound.parent, compare_counts=False)
    assert found.is_sound and found.differences is None and len(found.samples) == 6
    figures = found.figures()
    assert figures["counts"]["DC"] == {"40": 1, "100": 0, "200": 1, "400": 0}
    assert figures["counts_by_class"]["malignant"] == {"40": 2, "100": 0, "200": 2, "400": 0}
    assert figures["patients"] == 2 and figures["slides"] == 3 and figures["other_sizes"] == {"6x8": 6}
    assert figures["patients_of_several_types"] == {"2": ["DC", "LC"]}


def test_counts_are_held_against_the_published_ones(sound):
    found = verify_data(sound)
    assert not found.is_sound and found.differences is not None and len(found.differences) == 32
    assert ("A", 40, 1, 114) in found.differences and ("MC", 400, 0, 169) in found.differences


def test_every_kind_of_fault_is_found(sound, tmp_path):
    a40, a200 = (image_path(sound, "A", "14-1", m, "001") for m in (40, 200))
    dc40 = image_path(sound, "DC", "14-2AB", 40, "001")
    # the same pixels in another format, of another patient and class
    copy = image_path(sound, "PC", "14-9", 40, "002", ".tif")
    copy.parent.mkdir(parents=True)
    Image.open(a40).save(copy)
    a200.write_bytes(a200.read_bytes()[:-20])
    (dc40.parent / "SOB_M_DC-14-2AB-200-004.png").write_bytes(dc40.read_bytes())  # in the folder of 40X
    malignant_of_1 = image_path(sound, "MC", "14-1", 100, "001")
    malignant_of_1.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((460, 700, 3), np.uint8)).save(malignant_of_1)
    found = verify_data(tmp_path, compare_counts=False, workers=1)
    assert not found.is_sound
    assert [skipped.path.name for skipped in found.unusable] == ["SOB_M_DC-14-2AB-200-004.png"]
    assert [skipped.path for skipped in found.unreadable] == [a200] and "truncated" in found.unreadable[0].reason
    (group,) = found.figures()["duplicates"]
    assert set(group["paths"]) == {str(a40), str(copy)} and group["across_patients"] and group["across_classes"]
    assert found.mixed_patients == ("1",) and found.other_sizes == {(6, 8): 6}


def test_command_prints_and_returns(sound, tmp_path, capsys):
    assert main(["data", "verify", str(sound), "--any-counts", "--out", str(tmp_path / "found.json")]) == 0
    shown = capsys.readouterr().out
    assert "NOT" not in shown and "6 images, 2 patients, 3 slides" in shown and "A adenosis" in shown
    assert json.loads((tmp_path / "found.json").read_text())["sound"] is True
    assert main(["data", "verify", str(sound), "--quiet"]) == 3
    shown = capsys.readouterr().out
    assert "1/114" in shown and "6/7909" in shown and "NOT sound" in shown
    shutil.copy(image_path(sound, "A", "14-1", 40, "001"), image_path(sound, "A", "14-1", 40, "002"))
    assert main(["data", "verify", str(sound), "--any-counts", "--json"]) == 3
    assert len(json.loads(capsys.readouterr().out)["duplicates"][0]["paths"]) == 2


def test_no_data_set_there(tmp_path, capsys):
    assert main(["data", "verify", str(tmp_path)]) == 2
    assert "no BreakHis data" in capsys.readouterr().err


def test_real_images_are_sound(mini):
    found = verify_data(find_tree(mini), compare_counts=False)
    assert found.is_sound, found.figures()
