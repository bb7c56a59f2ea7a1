"""The data set: what it selects, what it refuses, how it is loaded."""

from __future__ import annotations

import pickle
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ernet_fast.data import BreakHis, ImageReadError, PatchTransform, Skipped, make_splits, read_image, write_split_csv
from ernet_fast.data.layout import image_path


def names(dataset: BreakHis) -> list[str]:
    return [sample.name for sample in dataset.samples]


def test_items_and_attributes(make_tree) -> None:
    dataset = BreakHis(make_tree(), "train")
    assert dataset.classes == ["benign", "malignant"]
    assert len(dataset) == len(dataset.samples) == len(dataset.targets)
    image, target = dataset[3]
    assert image.dtype == torch.uint8 and image.shape == (3, 8, 9)
    assert torch.equal(image, read_image(dataset.samples[3].path))
    assert type(target) is int and target == dataset.samples[3].malignant
    assert torch.equal(dataset[-1][0], read_image(dataset.samples[-1].path))
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    assert dataset.skipped == []
    assert "train" in repr(dataset) and f"{len(dataset)} images" in repr(dataset)


def test_splits_are_disjoint_in_patients_and_complete(make_tree) -> None:
    root = make_tree()
    parts = [BreakHis(root, split, fold=2) for split in ("train", "val", "test")]
    patients = [{sample.patient for sample in part.samples} for part in parts]
    assert [len(p) for p in patients] == [8, 2, 4]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 14
    assert sorted(name for part in parts for name in names(part)) == names(BreakHis(root, "all"))
    assert names(BreakHis(root, "trainval")) == sorted(names(parts[0]) + names(parts[1]))
    assert names(BreakHis(root, "test", fold=4)) == names(parts[2])


def test_subtype_target_and_target_transform(make_tree) -> None:
    dataset = BreakHis(make_tree(), "all", target="subtype", target_transform=lambda label: 10 * label)
    assert len(dataset.classes) == 8 and dataset.classes[3] == "tubular_adenoma"
    codes = ["A", "F", "PT", "TA", "DC", "LC", "MC", "PC"]
    assert dataset.targets == [codes.index(sample.subtype) for sample in dataset.samples]
    assert dataset[0][1] == 10 * dataset.targets[0]


def test_magnification_selects_without_moving_patients(make_tree) -> None:
    root = make_tree(magnifications=(40, 100, 400))
    whole = BreakHis(root, "test")
    for wanted in (100, [100], (400, 40)):
        some = BreakHis(root, "test", magnifications=wanted)
        keep = {wanted} if isinstance(wanted, int) else set(wanted)
        assert some.samples == [sample for sample in whole.samples if sample.magnification in keep]
    with pytest.raises(ValueError, match=r"magnifications=20.*\(40, 100, 200, 400\)"):
        BreakHis(root, magnifications=20)
    with pytest.raises(ValueError, match=r"magnifications=\[\]"):
        BreakHis(root, magnifications=[])
    with pytest.raises(ValueError, match=r"no image is left .*magnifications=\(200,\).*8 at 40X, 8 at 100X, 8 at 400X"):
        BreakHis(root, "test", magnifications=200)


def test_image_wise_splits_on_request(make_tree) -> None:
    root = make_tree(images=10)
    train, test = (BreakHis(root, split, split_by="image") for split in ("train", "test"))
    assert {s.patient for s in train.samples} & {s.patient for s in test.samples}
    assert not set(names(train)) & set(names(test))


def test_the_split_does_not_depend_on_the_file_system(
    make_tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    root = make_tree()
    before = [names(BreakHis(root, split, seed=5)) for split in ("train", "val", "test")]
    moved = tmp_path / "other" / "place"
    moved.parent.mkdir()
    root.rename(moved)
    listing = os.scandir

    class Reversed:
        def __init__(self, folder: object) -> None:
            self.entries = list(listing(folder))[::-1]

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Reversed)
    assert [names(BreakHis(moved, split, seed=5)) for split in ("train", "val", "test")] == before


def test_arguments_are_checked_before_any_work() -> None:
    for arguments, what in (
        ({"split": "valid"}, "split='valid'"),
        ({"target": "label"}, "target='label'"),
        ({"split_by": "slide"}, "split_by='slide'"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
    ):
        with pytest.raises(ValueError, match=what):
            BreakHis("does not exist", **arguments)


def test_missing_and_empty_folders(make_tree, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        BreakHis(tmp_path / "nowhere")
    (tmp_path / "breast" / "benign").mkdir(parents=True)
    with pytest.raises(ValueError, match="no usable image below"):
        BreakHis(tmp_path)
    with pytest.raises(ValueError, match="fold=5"):
        BreakHis(make_tree(), fold=5)


def test_too_few_patients_is_an_error_but_everything_can_be_read(make_tree) -> None:
    root = make_tree(patients=3)
    with pytest.raises(ValueError, match="class 'benign' has too few patients: of 3"):
        BreakHis(root)
    assert len(BreakHis(root, num_folds=2)) > 0
    everything = BreakHis(root, "all")
    assert len(everything) == 24 and everything.splits is None


def test_a_class_without_images_is_a_warning(make_tree) -> None:
    root = make_tree(patients=7, extra=[("A", "14-500", 100, "001")])
    with pytest.warns(UserWarning, match=r"split 'trainval' .* has no image of: malignant"):
        BreakHis(root, "trainval", magnifications=100, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BreakHis(root, "trainval")


def test_bad_names_raise_together_or_are_listed(make_tree) -> None:
    root = make_tree()
    good = BreakHis(root, "all").samples
    odd = good[0].path.with_name("holiday.png")
    odd.write_bytes(good[0].path.read_bytes())
    moved = good[5].path.parent / "SOB_B_A-14-77-200-001.png"
    moved.write_bytes(good[0].path.read_bytes())
    with pytest.raises(ValueError, match=r"2 image\(s\) .* cannot be used") as caught:
        BreakHis(root)
    assert str(odd) in str(caught.value) and str(moved) in str(caught.value) and "on_error='skip'" in str(caught.value)
    dataset = BreakHis(root, "all", on_error="skip")
    assert dataset.samples == good
    assert [skipped.path for skipped in dataset.skipped] == sorted([odd, moved])
    assert all(isinstance(skipped, Skipped) and skipped.reason for skipped in dataset.skipped)


def test_many_bad_names_are_counted(make_tree) -> None:
    root = make_tree()
    folder = BreakHis(root, "all").samples[0].path.parent
    for k in range(25):
        (folder / f"{k:02d}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"25 image\(s\)") as caught:
        BreakHis(root)
    assert "09.png" in str(caught.value) and "10.png" not in str(caught.value) and "and 15 more" in str(caught.value)


def damage(path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-50])


def test_damaged_images(make_tree) -> None:
    root = make_tree()
    whole = BreakHis(root, "train")
    victims = [whole.samples[2].path, whole.samples[9].path]
    for victim in victims:
        damage(victim)
    dataset = BreakHis(root, "train")  # nothing is decoded yet
    with pytest.raises(ImageReadError, match="truncated") as caught:
        dataset[2]
    assert str(victims[0]) in str(caught.value)
    with pytest.raises(ImageReadError, match=r"truncated.*and 1 more of the 32 selected") as caught:
        BreakHis(root, "train", verify=True)
    assert str(victims[0]) in str(caught.value)
    skipping = BreakHis(root, "train", on_error="skip")
    assert [s.path for s in skipping.skipped] == victims
    assert skipping.samples == [s for s in whole.samples if s.path not in victims]
    assert len(skipping.targets) == len(skipping) == 30
    # The split itself does not move, and other parts do not report these images.
    assert BreakHis(root, "val", on_error="skip").skipped == []
    assert len(BreakHis(root, "train", on_error="skip", verify=False)) == 32


def test_a_selection_of_damaged_images_alone_is_empty(make_tree) -> None:
    root = make_tree(extra=[("DC", "14-1000", 400, "001")])
    damage(image_path(root / "histology_slides", "DC", "14-1000", 400, "001"))
    with pytest.raises(ValueError, match=r"no image is left .*skipped as unusable: 1"):
        BreakHis(root, "all", magnifications=400, on_error="skip")


def test_split_file(make_tree, tmp_path: Path) -> None:
    root = make_tree(images=4)
    everything = BreakHis(root, "all").samples
    path = write_split_csv(tmp_path / "split.csv", make_splits(everything, num_folds=3, seed=9))
    for split in ("train", "val", "test"):
        assert names(BreakHis(root, split, split_file=path, fold=2)) == names(
            BreakHis(root, split, num_folds=3, seed=9, fold=2)
        )
    with pytest.raises(ValueError, match="fold=3; expected 0 <= fold < 3"):
        BreakHis(root, split_file=path, fold=3)
    by_image = write_split_csv(tmp_path / "by_image.csv", make_splits(everything, by="image"))
    with pytest.raises(ValueError, match="images of one patient in several parts"):
        BreakHis(root, split_file=by_image)
    assert len(BreakHis(root, split_file=by_image, split_by="image")) > 0
    with pytest.raises(FileNotFoundError, match=r"no split file at .*none\.csv"):
        BreakHis(root, split_file=tmp_path / "none.csv")


def test_split_file_that_does_not_fit_the_folder(make_tree, tmp_path: Path) -> None:
    root = make_tree()
    everything = BreakHis(root, "all").samples
    path = write_split_csv(tmp_path / "split.csv", make_splits(everything[1:]))
    gone = everything[7].path
    gone.unlink()
    with pytest.raises(ValueError, match=r"2 image\(s\) differ between .* and .*") as caught:
        BreakHis(root, split_file=path)
    assert f"{everything[0].path}: not listed" in str(caught.value) and f"{gone}: listed" in str(caught.value)
    dataset = BreakHis(root, "all", split_file=path, on_error="skip")
    assert {s.path for s in dataset.skipped} == {everything[0].path, gone}
    assert len(dataset) == len(everything) - 2


def test_pickles_and_loads_in_worker_processes(make_tree) -> None:
    dataset = BreakHis(make_tree(), "train", transform=PatchTransform(8, train=True))
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.samples == dataset.samples and copy.splits == dataset.splits
    for context in ("fork", "spawn"):
        loader = DataLoader(dataset, batch_size=8, num_workers=1, multiprocessing_context=context)
        batches = list(loader)
        assert sum(len(targets) for _, targets in batches) == len(dataset)
        assert batches[0][0].shape == (8, 3, 8, 8) and batches[0][0].dtype == torch.float32


def test_a_damaged_image_in_a_worker_is_named(make_tree) -> None:
    dataset = BreakHis(make_tree(), "train")
    damage(dataset.samples[1].path)
    batches = iter(DataLoader(dataset, batch_size=16, num_workers=1))
    with pytest.raises(ImageReadError, match=dataset.samples[1].path.name):
        next(batches)
    assert len(list(batches)) == 1  # the worker goes on with the batch that is sound


def test_jpeg_trees(make_tree) -> None:
    dataset = BreakHis(make_tree(suffix=".jpg"), "train")
    assert all(sample.path.suffix == ".jpg" for sample in dataset.samples)
    assert dataset[0][0].shape == (3, 8, 9)


def test_real_images(mini: Path) -> None:
    everything = BreakHis(mini, "all", verify=True)
    assert len(everything) == 880 and Counter(everything.targets) == {0: 301, 1: 579}
    parts = [BreakHis(mini, split) for split in ("train", "val", "test")]
    patients = [{sample.patient for sample in part.samples} for part in parts]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 34
    assert sum(map(len, parts)) == 880
    for part in parts:
        assert set(part.targets) == {0, 1}
    assert everything[0][0].shape == (3, 230, 350)
    where = [{p for p, who in enumerate(patients) if patient in who} for patient in ("22549", "21998", "19979")]
    assert all(len(parts_of_patient) == 1 for parts_of_patient in where)
