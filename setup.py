"""Builds the one extension `ernet_fast._C`: C++ for the CPU, and CUDA wherever nvcc is found (no GPU needed).

Environment variables
    ERNET_CUDA        auto (default: build the CUDA code if nvcc is found) | 0 (never) | 1 (fail without nvcc)
    ERNET_CUDA_ARCHS  e.g. "80;90a". Default: the architecture of the GPU at hand, else 75;80;86;90a;100;120
    MAX_JOBS          compilers at a time (default: the number of cores)
    CXX, CUDA_HOME    the C++ compiler, the CUDA toolkit
    ERNET_SANITIZE    e.g. "address,undefined": build with these sanitizers (for tests of the library itself)
    ERNET_WERROR      1: warnings of the C++ compiler are errors (continuous integration)
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
DEFAULT_ARCHS = "75;80;86;90a;100;120"
TARGET_TORCH = "0x020b000000000000"  # stable ABI of torch 2.11: one binary for this and every later version

# The sources in an operation's simd/ folder (csrc/*/**/simd/*.cpp), free of torch, are compiled once for each of these.
ISA_FLAGS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS |= {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
    ISA_FLAGS["avx512vbmi"] = [*ISA_FLAGS["avx512"], "-mavx512vbmi", "-mavx512vbmi2", "-mavx512vnni"]
# Outside those loops no product and sum are fused but where the code says so: what is computed in several places, as a
# fit from an image and from its colours, has the same bits in all of them, also on arm64, whose compilers would fuse.
SAME_BITS = ["-ffp-contract=off"]
# Only kernels over 8-bit images gain from the extensions beyond x86-64-v4.
SIMD_FOLDERS = {"avx512vbmi": ("macenko/cpu/simd",)}


def torch_location() -> tuple[Path, str]:
    """Folder and version of torch, found without importing it (an import would cost every build two seconds)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("ernet_fast: torch is needed to build. Install it first: pip install torch==2.13.0")
    folder = Path(spec.submodule_search_locations[0])
    found = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())
    return folder, found.group(1) if found else "unknown"


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, else c++, g++ or clang++."""
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            return name
    if chosen:
        raise SystemExit(f"ernet_fast: CXX={chosen!r} is no program on the PATH. Correct or unset CXX.")
    return None


def find_nvcc() -> str | None:
    """nvcc, as ERNET_CUDA asks: None where the CUDA code is not to be built."""
    wanted = os.environ.get("ERNET_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"ernet_fast: ERNET_CUDA={wanted!r}; expected auto, 0 or 1.")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for nvcc in candidates:
        nvcc = nvcc.resolve()
        # a wrapper script on the PATH has no toolkit beside it
        if nvcc.is_file() and (nvcc.parent.parent / "include" / "cuda_runtime_api.h").exists():
            return str(nvcc)
    if wanted == "1":
        raise SystemExit("ernet_fast: ERNET_CUDA=1 but no CUDA toolkit with nvcc was found. Set CUDA_HOME.")
    return None


def present_archs() -> list[str]:
    """Architectures of the GPUs of this machine, asked of the driver; empty without one."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    archs = set()
    for index in range(count.value):
        major, minor = ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, index)  # COMPUTE_CAPABILITY_MAJOR
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, index)
        arch = major.value * 10 + minor.value
        archs.add("90a" if arch == 90 else str(arch))
    return sorted(archs)


def cuda_archs() -> list[str]:
    """The architectures to build for."""
    text = os.environ.get("ERNET_CUDA_ARCHS") or ";".join(present_archs()) or DEFAULT_ARCHS
    archs = [arch for arch in re.split(r"[;, ]+", text) if arch]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise SystemExit(f"ernet_fast: ERNET_CUDA_ARCHS has {arch!r}; expected numbers such as 80;90a;120.")
    return archs


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it: unchanged trees build in no time, and each .cu is given to nvcc directly."""

    def run(self) -> None:
        """Build, or say how to get a compiler and leave the package to run on its reference implementation."""
        if find_compiler() is None:
            if os.environ.get("ERNET_CUDA") == "1":
                raise SystemExit("ernet_fast: ERNET_CUDA=1 but there is no C++ compiler. Install g++ or clang++.")
            print(
                "ernet_fast: no C++ compiler found; installing without the compiled operators. The package will run on "
                "its slow reference implementation. To fix: install g++ or clang++, then install ernet_fast again.",
                file=sys.stderr,
            )
            self.extensions.clear()
            return
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Compile and link the extension with ninja."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve() / ("sanitize" if os.environ.get("ERNET_SANITIZE") else "release")
        folder.mkdir(parents=True, exist_ok=True)
        script = NinjaScript(folder, target, self.distribution.get_version()).text()
        path = folder / "build.ninja"
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once in one folder would ruin ninja's log for good
            if not path.exists() or path.read_text() != script:
                path.write_text(script)
            subprocess.run([*ninja_command(), "-f", str(path), "-j", jobs, "--quiet"], cwd=ROOT, check=True)


def ninja_command() -> list[str]:
    """The ninja of this Python environment, else the one on the PATH."""
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    found = shutil.which("ninja")
    if found is None:
        raise SystemExit("ernet_fast: ninja is needed to build. Install it: pip install ninja")
    return [found]


class NinjaScript:
    """The text of build.ninja: which files, which flags."""

    def __init__(self, folder: Path, target: Path, version: str) -> None:
        self.folder, self.target, self.version = folder, target, version
        self.torch, self.torch_version = torch_location()
        self.cxx = find_compiler()
        self.nvcc = find_nvcc()
        self.archs = cuda_archs() if self.nvcc else []
        self.objects: list[str] = []
        self.lines: list[str] = []

    def text(self) -> str:
        """The whole file."""
        self._rules()
        for source in sorted(CSRC.rglob("*.cpp")):
            folder = source.parent.relative_to(CSRC)
            if folder.name == "simd" and len(folder.parts) > 1:
                self._compile_per_isa(source, str(folder))
            elif folder.name == "cuda":
                if self.nvcc:
                    toolkit = f"-isystem {self._toolkit() / 'include'}"
                    self._compile(source, "cxx", [*SAME_BITS, "-DERNET_WITH_CUDA", toolkit])
            elif source.name == "module.cpp":
                self._compile(source, "cxx", [*self._definitions(), *(["-DERNET_WITH_CUDA"] if self.nvcc else [])])
            else:
                self._compile(source, "cxx", [*SAME_BITS, *(f"-DERNET_HAS_{isa.upper()}" for isa in ISA_FLAGS)])
        for source in sorted(CSRC.rglob("*.cu")) if self.nvcc else ():
            self._compile(source, "nvcc", [])
        self.lines.append(f"build {escape(self.target)}: link {' '.join(self.objects)}")
        return "\n".join(self.lines) + "\n"

    def _rules(self) -> None:
        sanitize = os.environ.get("ERNET_SANITIZE")
        san = f" -fsanitize={sanitize} -fno-omit-frame-pointer -g" if sanitize else ""
        werror = " -Werror" if os.environ.get("ERNET_WERROR", "0") == "1" else ""
        python_include = sysconfig.get_paths()["include"]
        pybind_include = self._pybind_include()
        include = f"-I{CSRC} -isystem {pybind_include} -isystem {self.torch / 'include'} -isystem {python_include}"
        common = f"-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra{werror} -DTORCH_TARGET_VERSION={TARGET_TORCH}"
        common += f" -ffile-prefix-map={ROOT}/="  # no build folder in error messages
        links = f"-L{self.torch / 'lib'} -ltorch_cpu"
        if self.nvcc:
            links += f" {self._library('libcudart_static.a')} -ldl -lrt -lpthread"
        gencode = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs)
        if self.archs:  # PTX of the newest plain architecture, so that later GPUs run too
            plain = [a for a in self.archs if a.isdigit()]
            gencode += f" -gencode=arch=compute_{plain[-1]},code=compute_{plain[-1]}" if plain else ""
        self.lines += [
            "ninja_required_version = 1.8",
            f"builddir = {escape(self.folder)}",
            "rule cxx",
            f"  command = {self.cxx} {common}{san} {include} $extra -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule nvcc",
            # Spills, local memory and every other ptxas warning are errors. A product and a sum are fused where the
            # code says so and nowhere else, so that every kernel rounds as the C++ of the CPU does. The binary keeps
            # line numbers, for profilers and the counts of `dev.py kernels`; compressed, they cost little.
            f"  command = {self.nvcc} -O3 -std=c++17 -fmad=false {gencode} -lineinfo -Xfatbin=-compress-all "
            f"-I{CSRC} "
            "-Xcompiler -fPIC,-fvisibility=hidden "
            "-Xptxas -warn-spills,-warn-lmem-usage,-Werror -Werror all-warnings -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {self.cxx} -shared{san} $in -o $out {links}",
        ]

    def _pybind_include(self) -> Path:
        """The headers of pybind11: the package's, else those that torch comes with."""
        spec = importlib.util.find_spec("pybind11")
        if spec is not None and spec.submodule_search_locations:
            return Path(spec.submodule_search_locations[0]) / "include"
        if (self.torch / "include" / "pybind11" / "pybind11.h").exists():
            return self.torch / "include"
        raise SystemExit("ernet_fast: pybind11 is needed to build. Install it: pip install pybind11")

    def _compile_per_isa(self, source: Path, folder: str) -> None:
        for isa, flags in ISA_FLAGS.items():
            if isa not in SIMD_FOLDERS or folder in SIMD_FOLDERS[isa]:
                extra = [f"-DERNET_ISA={isa}", *flags, "-fno-math-errno", "-fno-trapping-math"]
                self._compile(source, "cxx", extra, suffix=f".{isa}")

    def _compile(self, source: Path, rule: str, extra: list[str], suffix: str = "") -> None:
        name = str(source.relative_to(CSRC)).replace(os.sep, "_")
        output = escape(self.folder / f"{name}{suffix}.o")
        self.objects.append(output)
        self.lines += [f"build {output}: {rule} {escape(source)}", f"  extra = {' '.join(extra)}"]

    def _definitions(self) -> list[str]:
        values = {
            "ERNET_VERSION": self.version,
            "ERNET_ISA_VARIANTS": ";".join(ISA_FLAGS),
            "ERNET_CUDA_ARCHS": ";".join(self.archs),
            "ERNET_TORCH_HEADERS": self.torch_version,
            "ERNET_SANITIZE": os.environ.get("ERNET_SANITIZE", ""),
        }
        # the module takes nothing of torch, whose own pybind11 refuses to be included where the stable ABI is asked for
        return ["-UTORCH_TARGET_VERSION", *(shlex.quote(f'-D{key}="{value}"') for key, value in values.items())]

    def _toolkit(self) -> Path:
        assert self.nvcc is not None
        return Path(self.nvcc).parent.parent

    def _library(self, name: str) -> Path:
        for sub in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
            path = self._toolkit() / sub / name
            if path.exists():
                return path
        raise SystemExit(
            f"ernet_fast: {name} was not found under {self._toolkit()}. Install the CUDA runtime, or set ERNET_CUDA=0."
        )


def escape(path: Path) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(ext_modules=[Extension("ernet_fast._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
