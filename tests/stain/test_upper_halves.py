"""The AVX2 and AVX-512 code returns with the upper halves of the vector registers unused, on any vendor's processor."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from upper_halves import functions_in_use_at_exit

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# The flags of setup.py.
COMPILE = ["g++", "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
ISAS = {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
ISAS["avx512vbmi"] = [*ISAS["avx512"], "-mavx512vbmi", "-mavx512vbmi2", "-mavx512vnni"]
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
    for tool in ("g++", "objdump"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")


def compiled(source: Path, output: Path, *flags: str) -> Path:
    subprocess.run([*COMPILE, f"-I{CSRC}", *flags, "-c", str(source), "-o", str(output)], check=True)
    return output


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_functions_leave_no_upper_half_in_use(isa, tmp_path):
    folders = ["macenko/cpu/simd"] if isa == "avx512vbmi" else ["macenko/cpu/simd", "er/simd"]
    sources = [source for folder in folders for source in sorted((CSRC / folder).glob("*.cpp"))]
    if not sources:
        pytest.skip("needs the C++ sources")

    def build(source: Path) -> Path:
        return compiled(
            source, tmp_path / f"{source.stem}.{source.parent.parent.name}.o", f"-DERNET_ISA={isa}", *ISAS[isa]
        )

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(build, sources))
    wrong, wide = functions_in_use_at_exit(objects)
    assert wide >= len(sources) / 2  # the listings were understood
    assert not wrong


def test_a_function_that_does_is_found(tmp_path):
    source = tmp_path / "planted.cpp"
    source.write_text(PLANTED)
    wrong, wide = functions_in_use_at_exit([compiled(source, tmp_path / "kept.o", "-mavx2", "-mno-vzeroupper")])
    assert wide == 2
    assert {line.split(":")[1].split("(")[0].strip() for line in wrong} == {"add", "mixed"}
    right, wide = functions_in_use_at_exit([compiled(source, tmp_path / "cleared.o", "-mavx2")])
    assert (right, wide) == ([], 2)
