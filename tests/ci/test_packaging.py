"""What the weekly checks of wheels, installs, other versions and documents conclude from what they are given."""

from __future__ import annotations

import zipfile
from pathlib import Path

import build_wheel
import compat
import installs
import pytest

import docs

ROOT = Path(__file__).resolve().parents[2]
NAME = "ernet_fast-1-py3-none-manylinux_2_34_x86_64.whl"
NEEDED = ["libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"]


def wheel(folder: Path, *files: str, name: str = NAME) -> Path:
    path = folder / name
    with zipfile.ZipFile(path, "w") as file:
        for one in ("ernet_fast/__init__.py", "ernet_fast/libernet.so", *files):
            file.writestr(one, "content")
    return path


def test_a_wheel_as_it_should_be_has_no_fault(tmp_path):
    assert build_wheel.faults(wheel(tmp_path), NEEDED, [], cuda=True) == []


@pytest.mark.parametrize("file", ["ernet_fast.libs/libcudart-0.so.12", "ernet_fast/libtorch_cpu.so", "x/libc10.so"])
def test_a_wheel_that_holds_torch_or_a_cuda_runtime_is_found(file, tmp_path):
    (fault,) = build_wheel.faults(wheel(tmp_path, file), NEEDED, [], cuda=True)
    assert file in fault


def test_a_library_that_needs_more_is_found(tmp_path):
    found = build_wheel.faults(wheel(tmp_path), [*NEEDED, "libcudart.so.13"], ["PyList_New"], cuda=True)
    assert len(found) == 2 and "libcudart.so.13" in found[0] and "PyList_New" in found[1]


def test_a_wheel_of_one_python_or_one_system_is_found(tmp_path):
    for name in ("ernet_fast-1-cp311-cp311-manylinux_2_34_x86_64.whl", "ernet_fast-1-py3-none-linux_x86_64.whl"):
        (fault,) = build_wheel.faults(wheel(tmp_path, name=name), NEEDED, [], cuda=False)
        assert "every Python 3" in fault


def test_a_wheel_over_its_budget_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(build_wheel, "BUDGET_MIB", {"without CUDA": 0, "with CUDA": 1})
    (fault,) = build_wheel.faults(wheel(tmp_path), NEEDED, [], cuda=False)
    assert "budget without CUDA is 0 MiB" in fault
    assert build_wheel.faults(wheel(tmp_path), NEEDED, [], cuda=True) == []


def test_the_lines_of_the_readme_are_found():
    lines = installs.readme_lines((ROOT / "README.md").read_text())
    assert len(lines) >= 2 and all(line.startswith(("pip install ", "ernet-fast ")) for line in lines)
    assert not any("#" in line for line in lines)
    with pytest.raises(AssertionError, match="no section Install"):
        installs.readme_lines("# Another page\n")


def test_torchvision_goes_with_torch():
    assert compat.torchvision_of("2.14.1") == "0.29.1" and compat.torchvision_of("2.11.0") == "0.26.0"


def row(date: str, tests: str = "tests: 10", torch: str = "2.14.1") -> str:
    return f"| {torch} | 2.13.0 | 0.29.1 | 1.0.31 | 3.11.7 | {date} | {tests} | all passed, 0 skipped |"


def test_a_row_takes_the_place_of_one_of_the_same_versions_and_tests():
    page = f"before\n{compat.BEGIN}\n{compat.END}\nafter\n"
    page = compat.table_with(page, row("2026-01-01"))
    page = compat.table_with(page, row("2026-01-02", torch="2.11.0"))
    page = compat.table_with(page, row("2026-01-03", "tests/er: 3"))
    page = compat.table_with(page, row("2026-02-01", "tests: 12"))
    assert page.startswith("before\n") and page.endswith("\nafter\n")
    assert "2026-01-01" not in page and page.count("| 3.11.7 |") == 3


def test_outcomes_are_counted(tmp_path):
    report = tmp_path / "report.xml"
    cases = "<testcase/><testcase><skipped/></testcase><testcase><failure/></testcase><testcase><error/></testcase>"
    report.write_text(f"<testsuite>{cases}</testsuite>")
    assert compat.outcome_of(report) == ("3", "2 failed, 1 skipped")


def test_links_hold_on_the_site(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "OUT", tmp_path)
    text = "[a](docs/cli.md#demo) [b](bench/results) ![c](docs/images/tissue.jpg) [d](https://example.org) [e](#here)"
    found = docs.with_links(text, ROOT / "README.md")
    assert found == "[a](cli.md#demo) b ![c](images/tissue.jpg) [d](https://example.org) [e](#here)"
    assert (tmp_path / "images" / "tissue.jpg").exists()
    assert docs.with_links("[r](../README.md)", ROOT / "docs" / "cli.md") == "[r](index.md)"


def test_the_reference_names_everything_public_once():
    lines = [line for line in docs.reference().splitlines() if line.startswith(":::")]
    names = [line.rpartition(".")[2] for line in lines]
    assert "::: ernet_fast.stain.MacenkoNormalizer" in lines and "::: ernet_fast.er_resnet50" in lines
    assert len(names) == len(set(names)) > 40
