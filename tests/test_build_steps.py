"""The steps of a first build: loops before torch is there, this CPU's instruction sets first, nothing twice."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script(monkeypatch):
    for name in ("ERNET_ISAS", "ERNET_SANITIZE", "ERNET_OPTIMIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ERNET_CUDA", "0")
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    found = runpy.run_path(str(ROOT / "setup.py"))
    if len(found["ISA_FLAGS"]) < 3:
        pytest.skip("this processor's instruction sets are one")
    return found


def statements(text: str) -> dict[str, str]:
    """How each object is made: its source, rule and flags."""
    lines = text.splitlines()
    return {line: lines[i + 1] for i, line in enumerate(lines) if line.startswith("build ") and ".o: " in line}


def whole(script, folder: Path) -> dict[str, str]:
    return statements(script["NinjaScript"](folder, folder / "libernet.so", "0").text())


def test_loops_are_compiled_without_torch_as_they_are_with_it(script, tmp_path, monkeypatch):
    def no_torch() -> None:
        raise AssertionError("torch was looked for")

    everything = whole(script, tmp_path)
    loops = script["NinjaLoops"](tmp_path)
    monkeypatch.setitem(script["NinjaScript"].__init__.__globals__, "torch_location", no_torch)
    assert len(loops.objects) == 0 and "CUDA" not in loops.described()
    found = statements(loops.text())
    assert found.items() <= everything.items() and len(found) > 20
    assert all("simd" in line and "torch" not in flags for line, flags in found.items())


def test_a_build_of_every_instruction_set_reuses_one_for_this_cpu(script, tmp_path, monkeypatch):
    everything = whole(script, tmp_path)
    monkeypatch.setitem(script["instruction_sets"].__globals__, "native_isa", lambda: "avx2")
    monkeypatch.setenv("ERNET_ISAS", "native")
    first = whole(script, tmp_path)
    assert any(".avx2.o:" in line for line in first) and not any(".avx512" in line for line in first)
    anew = {line.split()[1].rpartition("/")[2].rstrip(":") for line in first if everything[line] != first[line]}
    asking = ("er_dispatch", "conv_dispatch", "simd_isa", "macenko_cpu_image", "library")
    assert anew == {f"{name}.cpp.o" for name in asking}
    (tmp_path / "er_simd_table.cpp.avx512.o").touch()  # of a build before
    assert set(script["instruction_sets"](tmp_path)) == {"portable", "avx2", "avx512"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu sse2", "portable"),
        ("sse2 avx2 fma bmi2", "avx2"),
        ("avx2 fma bmi2 avx512f avx512bw avx512vl avx512dq avx512cd", "avx512"),
        ("avx2 avx512f avx512bw avx512vl avx512dq avx512cd avx512_vbmi avx512_vbmi2 avx512_vnni", "avx512vbmi"),
    ],
)
def test_the_finest_instruction_set_of_a_cpu(flags, expected, script, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self, **_: f"processor : 0\nflags\t\t: {flags}\n")
    assert script["native_isa"]() == expected
