"""The AVX2 and AVX-512 loops return with the upper halves of the vector registers unused, on any vendor's processor."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from upper_halves import functions_in_use_at_exit

ROOT = Path(__file__).resolve().parents[2]
ISAS = ["avx2", "avx512", "avx512vbmi"]
PLANTED = """
#include <immintrin.h>
void add(const float* a, float* out) { _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(a), _mm256_loadu_ps(out))); }
double mixed(const double* a, double (*f)(double), int n) {
  if (n == 0) return 0;
  __m256d sum = _mm256_loadu_pd(a);
  for (int i = 1; i < n; ++i) sum = _mm256_add_pd(sum, _mm256_loadu_pd(a + 4 * i));
  return f(_mm256_cvtsd_f64(sum));
}
int scalar(int a) { return a + 1; }
"""


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("vector registers of x86-64")
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump")


def objects_of_the_build(isa: str) -> list[Path]:
    """What setup.py made of the Macenko loops of an instruction set; of several builds the newest."""
    sources = sorted((ROOT / "csrc" / "macenko").glob("**/simd/*.cpp"))
    names = [str(source.relative_to(ROOT / "csrc")).replace(os.sep, "_") + f".{isa}.o" for source in sources]
    found = {}
    for path in sorted(ROOT.glob("build/temp*/**/*.o"), key=lambda path: path.stat().st_mtime):
        if path.name in names:
            found[path.name] = path
    return list(found.values())


@pytest.mark.parametrize("isa", ISAS)
def test_functions_leave_no_upper_half_in_use(isa):
    objects = objects_of_the_build(isa)
    if not objects:
        pytest.skip("needs the object files of a build in this folder: python3 dev.py build")
    wrong, wide = functions_in_use_at_exit(objects)
    assert wide >= len(objects) / 2  # the listings were understood
    assert not wrong


def test_a_function_that_does_is_found(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    source = tmp_path / "planted.cpp"
    source.write_text(PLANTED)

    def compiled(name: str, *flags: str) -> Path:
        command = ["g++", "-O3", "-std=c++17", "-fPIC", *flags, "-c", str(source), "-o", str(tmp_path / name)]
        subprocess.run(command, check=True)
        return tmp_path / name

    wrong, wide = functions_in_use_at_exit([compiled("kept.o", "-mavx2", "-mno-vzeroupper")])
    assert wide == 2
    assert {line.split(":")[1].split("(")[0].strip() for line in wrong} == {"add", "mixed"}
    right, wide = functions_in_use_at_exit([compiled("cleared.o", "-mavx2")])
    assert (right, wide) == ([], 2)
