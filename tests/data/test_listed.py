"""Images in one folder a class, and in CSV lists; the published folds of BreakHis."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ernet_fast.data import BreakHis, ListedImages, Splits, make_splits, read_published_fold, write_split_csv
from ernet_fast.data.listed import layout_of


def write(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 9, 3), value % 256, np.uint8)).save(path)
    return path


@pytest.fixture
def folders(tmp_path):
    """Three classes of eight patients with two images each; every patient's are named alike."""
    for c, name in enumerate(("grade1", "grade2", "grade3")):
        for patient in range(8):
            for k in range(2):
                write(tmp_path / "set" / name / f"p{c}{patient}" / f"{k}.png", 10 * c + k)
    return tmp_path / "set"


def test_one_folder_a_class(folders):
    assert layout_of(folders) == "folders"
    train, val, test = (ListedImages(folders, split) for split in ("train", "val", "test"))
    assert train.classes == ["grade1", "grade2", "grade3"]
    assert len(train) + len(val) + len(test) == 48 and set(train.targets) == set(test.targets) == {0, 1, 2}
    parts = [{sample.patient for sample in part.samples} for part in (train, val, test)]
    assert not parts[0] & parts[1] and not (parts[0] | parts[1]) & parts[2]
    image, label = train[0]
    assert image.shape == (3, 8, 9) and train.samples[0].name.startswith(train.classes[label] + "/p")
    assert {sample.magnification for sample in train.samples} == {0}


def test_images_without_patients_are_their_own(folders, tmp_path):
    for k in range(12):
        write(tmp_path / "flat" / "ab"[k % 2] / f"{k}.png", k)
    flat = ListedImages(tmp_path / "flat", "all")
    assert len({sample.patient for sample in flat.samples}) == 12


def test_a_split_of_other_data_survives_files_and_checkpoints(folders, tmp_path):
    splits = ListedImages(folders, "train").splits
    assert Splits.from_dict(splits.to_dict()) == splits and splits.by == "patient"
    path = write_split_csv(tmp_path / "split.csv", splits)
    again = ListedImages(folders, "val", split_file=path)
    assert again.splits == splits
    (folders / "grade1" / "p00" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"1 image\(s\) differ"):
        ListedImages(folders, "val", split_file=path)


def test_a_csv_list(folders, tmp_path):
    lines = ["image,label,patient,slide,magnification"]
    for path in sorted(folders.rglob("*.png")):
        name = path.relative_to(tmp_path)
        lines.append(f"{name},{path.parts[-3]},{path.parts[-2]},s-{path.parts[-2]},{40 if path.stem == '0' else 200}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    assert layout_of(tmp_path / "list.csv") == "csv"
    listed = ListedImages(tmp_path / "list.csv", "all", magnifications=40)
    assert len(listed) == 24 and listed.samples[0].slide == "s-p00" and listed.samples[0].patient == "p00"
    assert len(ListedImages(tmp_path / "list.csv", "train")) < 48
    (tmp_path / "bad.csv").write_text("image,label\nset/grade1/p00/0.png,a\nnowhere.png,b\n")
    with pytest.raises(ValueError, match=r"bad\.csv, line 3 lists it, but there is no such file"):
        ListedImages(tmp_path / "bad.csv", "all")
    skipped = ListedImages(tmp_path / "bad.csv", "all", on_error="skip")
    assert len(skipped) == 1 and len(skipped.skipped) == 1
    (tmp_path / "none.csv").write_text("file,class\n")
    with pytest.raises(ValueError, match="no column image, label"):
        ListedImages(tmp_path / "none.csv", "all")


def test_what_is_refused(folders, tmp_path):
    write(folders / "loose.png")
    write(folders / "grade1" / "p00" / "1.jpg")
    with pytest.raises(ValueError, match=r"3 image\(s\).*") as caught:
        ListedImages(folders, "all")
    assert "no folder of a class" in str(caught.value) and "same image name" in str(caught.value)
    write(tmp_path / "one" / "only" / "a.png")
    with pytest.raises(ValueError, match=r"1 class\(es\)"):
        ListedImages(tmp_path / "one", "all")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ListedImages(tmp_path / "nowhere", "all")


def test_layouts_are_told_apart(make_tree, folders, tmp_path):
    assert layout_of(make_tree()) == "breakhis" and layout_of(tmp_path / "nowhere") == "breakhis"
    assert layout_of(folders, "csv") == "csv"


def test_published_folds(make_tree, tmp_path):
    root = make_tree(patients=8)
    everything = BreakHis(root, "all").samples
    held_out = {s.patient for s in everything if int(s.patient) % 3 == 0}
    lines = [f"{s.path.name}|{s.magnification}|1|{'test' if s.patient in held_out else 'train'}" for s in everything]
    path = tmp_path / "dsfold1.txt"
    path.write_text("\r\n".join(lines) + "\n")
    test = BreakHis(root, "test", split_file=path)
    assert {s.patient for s in test.samples} == held_out
    trainval = BreakHis(root, "trainval", split_file=path)
    assert len(trainval) + len(test) == len(everything)
    val = BreakHis(root, "val", split_file=path, fold=1, num_folds=3)
    assert val.splits.num_folds == 3 and not {s.patient for s in val.samples} & held_out
    assert read_published_fold(path, num_folds=3, seed=1) == read_published_fold(path, num_folds=3, seed=1)
    (tmp_path / "bad.txt").write_text(lines[0] + "\n" + lines[1].replace("train", "val").replace("test", "val"))
    with pytest.raises(ValueError, match=r"bad\.txt, line 2.*expected image\|magnification\|fold\|train"):
        read_published_fold(tmp_path / "bad.txt")


def test_splits_of_breakhis_are_what_they_were(published):
    """The split that earlier versions made of the published data set, by a digest of its folds."""
    import hashlib

    folds = make_splits(published, seed=0).fold_of
    digest = hashlib.sha256(repr(sorted(folds.items())).encode()).hexdigest()
    assert digest[:16] == "080ea03d94b7d288"
