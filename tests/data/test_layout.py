"""Names and folders of BreakHis."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from ernet_fast.data import Sample, parse_name
from ernet_fast.data.layout import find_tree, image_path, scan_tree


def test_parse_name_reads_every_part() -> None:
    path = Path("some/folder/SOB_B_TA-14-16184CD-40-007.PNG")
    assert parse_name(path) == Sample(path, 0, "TA", "14-16184CD", "16184", 40, "007")
    sample = parse_name("SOB_M_PC-15-190EF-400-012.jpg")
    assert (sample.label, sample.malignant, sample.slide, sample.patient) == (1, 1, "15-190EF", "190")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("IMG_0001.png", "does not parse"),
        ("SOB_B_A-14-22549AB-100.png", "does not parse"),
        ("SOB_B_A-14-22549AB-100-001 (1).png", "does not parse"),
        ("SOB_B_A-14-AB-100-001.png", "does not parse"),
        ("SOB_X_A-14-22549AB-100-001.png", "does not parse"),
        ("SOB_B_XX-14-22549AB-100-001.png", "tumour type 'XX'"),
        ("SOB_M_A-14-22549AB-100-001.png", "class 'M', but type A is 'B'"),
        ("SOB_B_A-14-22549AB-150-001.png", "magnification 150"),
    ],
)
def test_parse_name_refuses(name: str, what: str) -> None:
    with pytest.raises(ValueError, match=what) as caught:
        parse_name(name)
    assert name in str(caught.value)


def test_published_names_parse_to_the_published_totals(published: list[Sample]) -> None:
    assert len(published) == 7909
    assert Counter(sample.magnification for sample in published) == {40: 1995, 100: 2081, 200: 2013, 400: 1820}
    assert Counter(sample.malignant for sample in published) == {0: 2480, 1: 5429}
    slides = {(sample.subtype, sample.slide) for sample in published}
    assert len(slides) == 82
    # By the digits of the slide id the 24 benign and 58 malignant slides come from 16 and 54 patients.
    assert len({s.patient for s in published if not s.malignant}) == 16
    assert len({s.patient for s in published if s.malignant}) == 54


@pytest.mark.parametrize(
    "below", [".", "BreaKHis_v1", "BreaKHis_v1/histology_slides", "BreaKHis_v1/histology_slides/breast"]
)
def test_root_may_be_any_folder_above_the_images(make_tree, below: str) -> None:
    root = make_tree(patients=1).parent
    assert find_tree(root / below) == root / "BreaKHis_v1" / "histology_slides"


def test_find_tree_errors(make_tree, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        find_tree(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no BreakHis data below"):
        find_tree(tmp_path)
    archive = tmp_path / "BreaKHis_v1.tar.gz"
    archive.write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="unpack"):
        find_tree(archive)
    make_tree(patients=1, root="one")
    make_tree(patients=1, root="two")
    with pytest.raises(ValueError, match=r"2 data sets, choose one: .*one.*two"):
        find_tree(tmp_path)


def test_links_are_followed_but_not_in_circles(make_tree, tmp_path: Path) -> None:
    root = make_tree(patients=2)
    linked = tmp_path / "elsewhere" / "data"
    linked.parent.mkdir()
    linked.symlink_to(root, target_is_directory=True)
    (root / "up").symlink_to(tmp_path, target_is_directory=True)
    breast = root / "histology_slides" / "breast"
    (breast / "benign" / "again").symlink_to(breast, target_is_directory=True)
    tree = find_tree(tmp_path / "elsewhere")
    assert tree == linked / "histology_slides"
    samples, problems = scan_tree(tree)
    assert len(samples) == 16
    assert problems == []


def test_scan_lists_what_it_cannot_use(make_tree) -> None:
    tree = make_tree(patients=2, images=1, magnifications=(40,)) / "histology_slides"
    good = image_path(tree, "A", "14-0", 40, "001")
    content = good.read_bytes()
    odd_name, other_format = good.with_name("copy of 001.png"), good.with_name("scan.bmp")
    wrong_magnification = image_path(tree, "A", "14-0", 40, "005").with_name("SOB_B_A-14-0-100-005.png")
    wrong_class = (
        tree / "breast" / "malignant" / "SOB" / "adenosis" / "SOB_B_A_14-0" / "40X" / "SOB_B_A-14-0-40-006.png"
    )
    twice = image_path(tree, "F", "14-1", 40, "001", ".JPG")
    for path in (odd_name, other_format, wrong_magnification, wrong_class, twice):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for harmless in ("README.txt", "Thumbs.db", "._SOB_B_A-14-0-40-001.png", ".DS_Store"):
        good.with_name(harmless).write_bytes(b"")
    samples, problems = scan_tree(tree)
    assert [sample.name for sample in samples] == [
        "SOB_B_A-14-0-40-001",
        "SOB_M_DC-14-1000-40-001",
        "SOB_M_LC-14-1001-40-001",
    ]
    reasons = {problem.path.relative_to(tree).name: problem.reason for problem in problems}
    assert "does not parse" in reasons["copy of 001.png"]
    assert "'.bmp' is not supported" in reasons["scan.bmp"]
    assert "disagree" in reasons[wrong_magnification.name] and "40X" in reasons[wrong_magnification.name]
    assert "disagree" in reasons[wrong_class.name] and "malignant" in reasons[wrong_class.name]
    assert "occurs as" in reasons["SOB_B_F-14-1-40-001.png"] and "occurs as" in reasons["SOB_B_F-14-1-40-001.JPG"]
    assert len(problems) == 6


def test_resource_forks_of_an_archive_from_a_mac_are_ignored(make_tree, tmp_path: Path) -> None:
    root = make_tree(patients=2, images=1, magnifications=(40,))
    expected = scan_tree(find_tree(root))
    for path in list(root.rglob("*.png")):
        fork = tmp_path / "__MACOSX" / path.relative_to(tmp_path).with_name(f"._{path.name}")
        fork.parent.mkdir(parents=True, exist_ok=True)
        fork.write_bytes(b"\0\5\26\7")
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7")
        (path.parent / "__MACOSX").mkdir(exist_ok=True)
        (path.parent / "__MACOSX" / path.name).write_bytes(b"\0\5\26\7")
    assert scan_tree(find_tree(tmp_path)) == expected and len(expected[0]) > 0


def test_real_names_all_parse(mini: Path) -> None:
    samples, problems = scan_tree(find_tree(mini))
    assert problems == []
    assert len(samples) == 880
    assert Counter(sample.malignant for sample in samples) == {0: 301, 1: 579}
    assert Counter(sample.magnification for sample in samples) == {100: 297, 200: 583}
    assert len({sample.slide for sample in samples}) == 40
    assert len({sample.patient for sample in samples}) == 34
    assert len({s.slide for s in samples if s.patient == "22549"}) == 3
