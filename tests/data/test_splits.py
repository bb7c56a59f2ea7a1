"""Splits: disjoint, stratified, repeatable, written and read back."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernet_fast.data import Sample, Splits, make_splits, parse_name, read_split_csv, write_split_csv


def images(patients: dict[str, str], number: int = 3, magnifications: tuple[int, ...] = (40,)) -> list[Sample]:
    """`number` images of each patient (slide number to subtype) at each magnification."""
    letter = {"A": "B", "F": "B", "PT": "B", "TA": "B"}
    return [
        parse_name(f"SOB_{letter.get(subtype, 'M')}_{subtype}-14-{slide}-{magnification}-{k:03d}.png")
        for slide, subtype in patients.items()
        for magnification in magnifications
        for k in range(number)
    ]


def patients_of(splits: Splits) -> dict[int | None, set[str]]:
    parts: dict[int | None, set[str]] = {}
    for row in splits.rows:
        parts.setdefault(row.fold, set()).add(row.patient)
    return parts


@pytest.mark.parametrize("by", ["patient", "image"])
def test_every_image_is_in_one_part_and_splits_follow_from_parts(published: list[Sample], by: str) -> None:
    splits = make_splits(published, by=by)
    assert sorted(row.image for row in splits.rows) == sorted(sample.name for sample in published)
    assert splits.by == by
    test = splits.select(published, "test")
    for fold in range(5):
        train, val = splits.select(published, "train", fold), splits.select(published, "val", fold)
        assert splits.select(published, "test", fold) == test
        assert not set(train) & set(val) and not set(train + val) & set(test)
        assert sorted(train + val) == sorted(splits.select(published, "trainval", fold))
        assert len(train) + len(val) + len(test) == 7909
    vals = [sample for fold in range(5) for sample in splits.select(published, "val", fold)]
    assert sorted(vals) == sorted(splits.select(published, "trainval"))
    assert splits.select(published, "all") == published


@pytest.mark.parametrize("seed", range(6))
def test_patients_are_disjoint_and_stratified(published: list[Sample], seed: int) -> None:
    splits = make_splits(published, seed=seed)
    parts = patients_of(splits)
    assert sum(len(patients) for patients in parts.values()) == 70  # each of 16 + 54 in exactly one part
    malignant = {sample.patient for sample in published if sample.malignant}
    assert len(parts[None] & malignant) == 16 and len(parts[None] - malignant) == 5  # 30 % of 54 and of 16
    for label in (malignant, {sample.patient for sample in published} - malignant):
        in_fold = [len(parts[fold] & label) for fold in range(5)]
        assert max(in_fold) - min(in_fold) <= 1
    in_fold = [len(parts[fold]) for fold in range(5)]
    assert max(in_fold) - min(in_fold) <= 1
    # Image counts cannot be exact with whole patients (one has 493 images), but the class shares stay near.
    for label in (0, 1):
        held_out = sum(s.malignant == label for s in splits.select(published, "test"))
        assert held_out / sum(s.malignant == label for s in published) == pytest.approx(0.3, abs=0.06)


def test_images_of_a_patient_stay_together_whatever_the_slide_or_tumour_type(published: list[Sample]) -> None:
    splits = make_splits(published)
    for patient, slides, subtypes in (
        ("22549", 3, {"A"}),
        ("21998", 3, {"F", "PT"}),
        ("13412", 1, {"DC", "LC"}),
        ("29960", 2, {"A", "F"}),
    ):
        members = [sample for sample in published if sample.patient == patient]
        assert (
            len({sample.slide for sample in members}) == slides and {sample.subtype for sample in members} == subtypes
        )
        assert len({splits.fold_of[sample.name] for sample in members}) == 1


def test_a_patient_with_both_classes_counts_for_the_more_frequent_one() -> None:
    samples = images({str(k): "A" for k in range(7)} | {str(k): "DC" for k in range(10, 17)})
    samples += [parse_name(f"SOB_M_DC-14-0B-40-{k:03d}.png") for k in range(9)]  # patient 0: 3 benign, 9 malignant
    splits = make_splits(samples, num_folds=4)
    parts = patients_of(splits)
    assert sum("0" in patients for patients in parts.values()) == 1
    with pytest.raises(ValueError, match="class 'benign' has too few patients: of 6"):
        make_splits(samples, num_folds=5)


def test_image_wise_split_is_even_in_subtype_and_magnification(published: list[Sample]) -> None:
    splits = make_splits(published, by="image")
    assert splits.by == "image"
    sizes = Counter(splits.fold_of.values())
    # 30 % of each class within half an image each, and folds within one; two names that are one image count as one.
    for label, total in ((0, 2480), (1, 5429 - 123)):
        names = [
            s.name
            for s in splits.select(published, "test")
            if s.malignant == label and not (s.subtype == "LC" and s.patient == "13412")
        ]
        assert abs(len(names) - 0.3 * total) <= 0.5
    assert max(sizes[k] for k in range(5)) - min(sizes[k] for k in range(5)) <= 4
    cells = Counter((s.subtype, s.magnification) for s in published)
    held_out = Counter((s.subtype, s.magnification) for s in splits.select(published, "test"))
    for cell, total in cells.items():
        assert (
            abs(held_out[cell] - 0.3 * total) <= 2
        )  # 13412's stratum lies beside those of DC and LC: one unit from each


def test_one_image_filed_under_two_tumour_types_is_not_split(published: list[Sample]) -> None:
    splits = make_splits(published, by="image")
    twins = [sample for sample in published if sample.patient == "13412" and sample.subtype == "DC"]
    assert len(twins) == 123
    for sample in twins:
        other = sample.name.replace("_DC-", "_LC-")
        assert splits.fold_of[sample.name] == splits.fold_of[other]


@pytest.mark.parametrize("by", ["patient", "image"])
def test_deterministic_and_independent_of_order_and_location(published: list[Sample], by: str) -> None:
    splits = make_splits(published, by=by, seed=3)
    shuffled = [sample._replace(path=Path("/elsewhere") / sample.path.name, label=7) for sample in published]
    random.Random(0).shuffle(shuffled)
    assert make_splits(shuffled, by=by, seed=3) == splits
    assert make_splits(published, by=by, seed=4) != splits


def test_a_recorded_split_stays_as_it_is() -> None:
    """Fixed for good: papers name a seed. A failure here means that everyone's splits have changed."""
    samples = images(
        {str(100 + k): "AF"[k % 2] for k in range(10)} | {str(200 + k): ("DC", "MC")[k % 2] for k in range(10)}
    )
    parts = patients_of(make_splits(samples, num_folds=3, seed=7))
    assert parts == RECORDED


def test_test_set_does_not_depend_on_the_number_of_folds(published: list[Sample]) -> None:
    assert patients_of(make_splits(published, num_folds=3))[None] == patients_of(make_splits(published))[None]


def test_seeds_give_different_test_sets(published: list[Sample]) -> None:
    benign = {sample.patient for sample in published if not sample.malignant}
    assert len({frozenset(patients_of(make_splits(published, seed=seed))[None] & benign) for seed in range(12)}) >= 8


def test_no_test_set_on_request(published: list[Sample]) -> None:
    splits = make_splits(published, test_fraction=0)
    assert set(splits.fold_of.values()) == set(range(5))


def test_arguments_are_checked() -> None:
    samples = images({str(k): "A" for k in range(7)} | {str(k): "DC" for k in range(10, 17)})
    make_splits(samples)
    with pytest.raises(ValueError, match="by='slide'"):
        make_splits(samples, by="slide")
    with pytest.raises(ValueError, match="test_fraction=1"):
        make_splits(samples, test_fraction=1)
    with pytest.raises(ValueError, match="num_folds=1"):
        make_splits(samples, num_folds=1)
    with pytest.raises(ValueError, match="samples is empty"):
        make_splits([])
    with pytest.raises(ValueError, match="two images named"):
        make_splits([*samples, samples[0]._replace(path=Path("b") / samples[0].path.name)])
    with pytest.raises(
        ValueError, match=r"class 'benign' has too few patients: of 7, .*=0.3 holds out 2 and leaves 5 for num_folds=6"
    ):
        make_splits(samples, num_folds=6)
    with pytest.raises(ValueError, match=r"of 7, test_fraction=0.05 holds out 0"):
        make_splits(samples, test_fraction=0.05)
    with pytest.raises(ValueError, match=r"'benign' has too few images: of 21"):
        make_splits(samples, by="image", num_folds=18)
    splits = make_splits(samples)
    with pytest.raises(ValueError, match="fold=5"):
        splits.select(samples, "val", 5)
    with pytest.raises(ValueError, match="split='dev'"):
        splits.select(samples, "dev")


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=24, max_size=40),
    fraction=st.floats(0.1, 0.6),
    num_folds=st.integers(2, 5),
    seed=st.integers(0, 10**9),
)
def test_class_quotas_hold_for_any_composition(counts: list[int], fraction: float, num_folds: int, seed: int) -> None:
    samples = [s for k, n in enumerate(counts) for s in images({str(k): ("A", "DC")[k % 2]}, n)]
    splits = make_splits(samples, test_fraction=fraction, num_folds=num_folds, seed=seed)
    parts = patients_of(splits)
    for label in (0, 1):
        everyone = {str(k) for k in range(len(counts)) if k % 2 == label}
        assert abs(len(parts[None] & everyone) - fraction * len(everyone)) <= 0.5 + 1e-6
        in_fold = [len(parts[fold] & everyone) for fold in range(num_folds)]
        assert min(in_fold) >= 1 and max(in_fold) - min(in_fold) <= 1


@pytest.mark.parametrize("by", ["patient", "image"])
def test_csv_round_trip(tmp_path: Path, published: list[Sample], by: str) -> None:
    splits = make_splits(published, by=by)
    path = write_split_csv(tmp_path / "split.csv", splits)
    assert read_split_csv(path) == splits
    assert [entry.name for entry in tmp_path.iterdir()] == ["split.csv"]
    head = path.read_text(encoding="utf-8").splitlines()[:2]
    assert head[0] == "image,patient,subtype,split,fold"
    assert head[1].startswith("SOB_B_A-14-22549AB-100-001,22549,A,")


def test_csv_as_a_spreadsheet_saves_it(tmp_path: Path) -> None:
    samples = images({str(k): "A" for k in range(7)} | {str(k): "DC" for k in range(10, 17)})
    splits = make_splits(samples)
    path = write_split_csv(tmp_path / "split.csv", splits)
    lines = path.read_text().splitlines()
    reordered = [",".join(reversed(line.split(","))) for line in [lines[0], *reversed(lines[1:])]]
    path.write_bytes(("\ufeff" + "\r\n".join(reordered) + "\r\n").encode())
    assert read_split_csv(path) == splits


GOOD = "SOB_B_A-14-1-40-001,1,A,trainval,0\nSOB_B_A-14-2-40-001,2,A,trainval,1\n"


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ("", "lists no images"),
        (GOOD + "SOB_B_A-14-1-40-001,1,A,test,\n", r"line 4: image 'SOB_B_A-14-1-40-001' is listed twice"),
        (GOOD + "holiday.png,1,A,test,\n", r"line 4: file name 'holiday.png.png' does not parse"),
        (GOOD + "SOB_B_A-14-3-40-001,1,A,test,\n", r"line 4: patient '1'.* says '3'"),
        (GOOD + "SOB_B_A-14-3-40-001,3,A,test,1\n", r"line 4: split 'test', fold '1'"),
        (GOOD + "SOB_B_A-14-3-40-001,3,A,trainval,\n", r"line 4: split 'trainval', fold ''"),
        (GOOD + "SOB_B_A-14-3-40-001,3,A,train,0\n", r"line 4: split 'train'"),
        (GOOD + "SOB_B_A-14-3-40-001,3,A,trainval,-1\n", r"fold '-1'"),
        (GOOD + "SOB_B_A-14-3-40-001,3\n", r"line 4: patient '3', subtype ''"),
        (GOOD + "SOB_B_A-14-3-40-001,3,A,trainval,3\n", r"folds \[0, 1, 3\]"),
        ("SOB_B_A-14-1-40-001,1,A,trainval,0\n", r"folds \[0\]"),
    ],
)
def test_bad_csv_is_refused(tmp_path: Path, rows: str, what: str) -> None:
    path = tmp_path / "split.csv"
    path.write_text("image,patient,subtype,split,fold\n" + rows)
    with pytest.raises(ValueError, match=what) as caught:
        read_split_csv(path)
    assert str(path) in str(caught.value)


def test_other_files_are_no_split(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no split file"):
        read_split_csv(tmp_path / "none.csv")
    path = tmp_path / "split.csv"
    path.write_text("path,label\n")
    with pytest.raises(ValueError, match="no column image, patient, subtype, split, fold"):
        read_split_csv(path)
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(ValueError, match="not a CSV file"):
        read_split_csv(path)


RECORDED: dict[int | None, set[str]] = {
    None: {"104", "107", "108", "203", "204", "209"},
    0: {"101", "105", "106", "205", "208"},
    1: {"102", "109", "200", "201", "202"},
    2: {"100", "103", "206", "207"},
}
