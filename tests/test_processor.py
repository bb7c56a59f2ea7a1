"""Which CPU this is, as records, `ernet-fast bench` and `ernet-fast doctor` say it."""

from __future__ import annotations

import pytest

from ernet_fast import _backend
from ernet_fast.processor import caches_text, instruction_sets, microarchitecture, processor, processor_text

CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC 9R14
stepping\t: 1
flags\t\t: avx2 fma bmi2 avx512f avx512bw avx512vl avx512dq avx512cd

processor\t: 1
model name\t: another
"""


@pytest.fixture
def found(tmp_path):
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    caches = [("1", "Data", "32K"), ("1", "Instruction", "32K"), ("2", "Unified", "1024K"), ("3", "Unified", "32768K")]
    for index, values in enumerate(caches):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in zip(("level", "type", "size"), values, strict=True):
            (folder / name).write_text(f"{value}\n")
    return processor(tmp_path / "cpuinfo", tmp_path)


def test_a_cpu_is_described_by_name_numbers_caches_and_instruction_sets(found):
    assert found == {
        "name": "AMD EPYC 9R14", "vendor": "AuthenticAMD", "family": 25, "model": 17, "stepping": 1,
        "caches": {"L1d": 32 << 10, "L2": 1 << 20, "L3": 32 << 20}, "instruction_sets": ["portable", "avx2", "avx512"],
    }  # fmt: skip
    assert processor_text(found) == "AMD EPYC 9R14, family 25 model 17 (Zen 4), AVX-512"
    assert processor_text(found, "avx2").endswith("(Zen 4), AVX2")
    assert caches_text(found) == "caches L1d 32 KiB, L2 1 MiB, L3 32 MiB"


def test_a_system_that_says_nothing(tmp_path):
    found = processor(tmp_path / "absent", tmp_path)
    assert found["name"] and found["family"] is None and found["caches"] == {}
    assert processor_text(found) == f"{found['name']}, portable code" and caches_text(found) == ""
    assert processor_text({"name": "Some CPU"}) == "Some CPU", "what an earlier record knows"


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name"),
    [("AuthenticAMD", 25, 1, "Zen 3"), ("AuthenticAMD", 25, 0x11, "Zen 4"), ("AuthenticAMD", 26, 2, "Zen 5"),
     ("GenuineIntel", 6, 0x8F, "Sapphire Rapids"), ("GenuineIntel", 6, 1, None), ("ARM", None, None, None)],
)  # fmt: skip
def test_microarchitectures(vendor, family, model, name):
    assert microarchitecture({"vendor": vendor, "family": family, "model": model}) == name


def test_an_instruction_set_needs_the_one_before():
    vbmi = {"avx512vbmi", "avx512_vbmi2", "avx512_vnni"}
    assert instruction_sets(vbmi) == ["portable"]
    assert instruction_sets({"avx2", "fma", "bmi2"} | vbmi) == ["portable", "avx2"]


def test_the_instruction_set_in_use_is_one_of_those_found():
    info = _backend.build_info()
    if info is None or set(processor()["instruction_sets"]) == {"portable"}:
        pytest.skip("no compiled operators, or /proc/cpuinfo names no flags")
    assert info["isa"] in processor()["instruction_sets"]
