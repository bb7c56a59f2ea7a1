"""Builds the one library, `ernet_fast/libernet.so`: C++ for the CPU, and CUDA where nvcc is found and torch has CUDA.

The library knows nothing of Python and uses the stable ABI of torch, so that one binary serves every Python and every
torch from 2.11 on. No GPU is needed to build. Only Linux has it; elsewhere the Python code is installed alone.

Environment variables
    ERNET_CUDA        auto (default: build the CUDA code if nvcc is found, and torch has CUDA or ERNET_CUDA_ARCHS is
                      set) | 0 (never) | 1 (fail without nvcc)
    ERNET_CUDA_ARCHS  e.g. "80;90a". Default: the architecture of the GPU at hand, else 75;80;86;90a;100;120
    ERNET_ISAS        e.g. "avx2": the instruction sets to compile the loops for, besides portable; default all. For
                      development: a changed loop is compiled once or twice instead of four times. "native": those that
                      this CPU uses, and those that were compiled before; a build of all compiles the others alone
    ERNET_LOOPS_ONLY  1: compile the loops, which need no torch, and link nothing, as dev.py does while torch is fetched
    ERNET_OPTIMIZE    0 to 3 (default): how far g++ optimises. 0, for trying changes, compiles eight times as fast into
                      a folder of its own, and gives a slow library
    MAX_JOBS          compilers at a time (default: the number of cores)
    CXX, CUDA_HOME    the C++ compiler, which ccache serves where it is on the PATH; the CUDA toolkit
    ERNET_SANITIZE    e.g. "address,undefined": build with these sanitizers (for tests of the library itself)
    ERNET_WERROR      1: warnings of the C++ compiler are errors (continuous integration)
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1, with which builds in place work; wheels want what pyproject.toml asks for
    from setuptools import Command as bdist_wheel

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
DEFAULT_ARCHS = "75;80;86;90a;100;120"
TARGET_TORCH = "0x020b000000000000"  # stable ABI of torch 2.11: one binary for this and every later version

# The sources in an operation's simd/ folder (csrc/*/**/simd/*.cpp), free of torch, are compiled once for each of these.
ISA_FLAGS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS |= {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
    ISA_FLAGS["avx512vbmi"] = [*ISA_FLAGS["avx512"], "-mavx512vbmi", "-mavx512vbmi2", "-mavx512vnni"]
# What /proc/cpuinfo calls what they need, the finest first.
AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"}
CPU_FLAGS = {
    "avx512vbmi": AVX512 | {"avx512_vbmi", "avx512_vbmi2", "avx512_vnni"},
    "avx512": AVX512,
    "avx2": {"avx2", "fma", "bmi2"},
}
# Loops that are written in vectors throughout: what -O3 does besides unrolling takes a third of the time to compile
# them, and finds nothing to do.
IN_VECTORS = {"weighted_sum_planar.cpp", "weighted_sum_channels_last.cpp", "map_dots.cpp", "sum_dots.cpp"}
# Outside those loops no product and sum are fused but where the code says so: what is computed in several places, as a
# fit from an image and from its colours, has the same bits in all of them, also on arm64, whose compilers would fuse.
SAME_BITS = ["-ffp-contract=off"]
# Only kernels over 8-bit images gain from the extensions beyond x86-64-v4.
SIMD_FOLDERS = {"avx512vbmi": ("macenko/cpu/simd",)}


def refuse_musl() -> None:
    """End with a sentence where this Python uses musl."""
    if "musl" in (sysconfig.get_config_var("SOABI") or ""):
        raise SystemExit(
            "ernet_fast: this Python uses musl (Alpine Linux), for which there is no PyTorch. Use a system with glibc, "
            "such as the image python:3.12-slim."
        )


def native_isa() -> str:
    """The finest instruction set that this CPU has, as csrc/simd/isa.cpp chooses; portable where nobody can tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "portable"
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    flags = {*found[1].split()} if found else set()
    return next((isa for isa, needed in CPU_FLAGS.items() if isa in ISA_FLAGS and flags >= needed), "portable")


def instruction_sets(folder: Path | None = None) -> dict[str, list[str]]:
    """The instruction sets to compile the loops for, with their flags: all, or those of ERNET_ISAS and portable.

    To the native one belong those of which objects are in `folder`, so that such a build undoes no other.
    """
    wanted = {*re.findall(r"\w+", os.environ.get("ERNET_ISAS", ""))} or {*ISA_FLAGS}
    if "native" in wanted:
        before = {isa for isa in ISA_FLAGS if folder is not None and any(folder.glob(f"*.{isa}.o"))}
        wanted = wanted - {"native"} | {native_isa()} | before
    if unknown := wanted - {*ISA_FLAGS}:
        expected = ", ".join(["native", *ISA_FLAGS])
        raise SystemExit(f"ernet_fast: ERNET_ISAS names {', '.join(sorted(unknown))}; expected {expected}.")
    wanted |= {"portable"} | ({"avx512"} if "avx512vbmi" in wanted else set())  # whose ER loops it uses
    return {isa: flags for isa, flags in ISA_FLAGS.items() if isa in wanted}


def optimization() -> str:
    """The level of g++'s optimisation."""
    level = os.environ.get("ERNET_OPTIMIZE") or "3"
    if level not in ("0", "1", "2", "3"):
        raise SystemExit(f"ernet_fast: ERNET_OPTIMIZE={level!r}; expected 0, 1, 2 or 3.")
    return level


def torch_location() -> tuple[Path, str, bool]:
    """Folder and version of torch and whether it has CUDA, without an import, which would cost every build seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("ernet_fast: torch is needed to build. Install it first: pip install torch==2.13.0")
    folder = Path(spec.submodule_search_locations[0])
    text = (folder / "version.py").read_text()
    found = re.search(r"__version__ = '([^']+)'", text)
    return folder, found.group(1) if found else "unknown", re.search(r"^cuda\b.*= '", text, re.MULTILINE) is not None


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, else c++, g++ or clang++."""
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            return name
    if chosen:
        raise SystemExit(f"ernet_fast: CXX={chosen!r} is no program on the PATH. Correct or unset CXX.")
    return None


def find_nvcc(torch_has_cuda: bool) -> str | None:
    """nvcc, as ERNET_CUDA asks: None where the CUDA code is not to be built."""
    wanted = os.environ.get("ERNET_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"ernet_fast: ERNET_CUDA={wanted!r}; expected auto, 0 or 1.")
    asked = wanted == "1" or bool(os.environ.get("ERNET_CUDA_ARCHS"))
    if wanted == "0" or not (asked or torch_has_cuda):
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


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Two builds at once in one folder would ruin ninja's log for good: the second waits."""
    import fcntl  # which Windows has not

    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class LibraryWheel(bdist_wheel):
    """A wheel for every Python 3, as its library knows nothing of Python; for every system where it has none."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tags of Python, ABI and system."""
        return "py3", "none", super().get_tag()[2] if self.distribution.ext_modules else "any"


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it: unchanged trees build in no time, and each .cu is given to nvcc directly."""

    def get_ext_filename(self, fullname: str) -> str:
        """The library's file, named alike for every Python."""
        return f"{fullname.replace('.', os.sep)}.so"

    def run(self) -> None:
        """Build, or say why not and leave the package to run on its reference implementation."""
        refuse_musl()
        if sys.platform != "linux":
            self._leave_out(f"the compiled operators are for Linux; installing without them on {sys.platform}.")
        elif find_compiler() is None:
            if os.environ.get("ERNET_CUDA") == "1":
                raise SystemExit("ernet_fast: ERNET_CUDA=1 but there is no C++ compiler. Install g++ or clang++.")
            self._leave_out(
                "no C++ compiler found; installing without the compiled operators. The package will run on its slow "
                "reference implementation. To fix: install g++ or clang++, then install ernet_fast again."
            )
        else:
            super().run()

    def _leave_out(self, why: str) -> None:
        print(f"ernet_fast: {why}", file=sys.stderr)
        for extension in self.extensions:  # one of a build before would be packed
            (Path(self.build_lib) / self.get_ext_filename(extension.name.replace(".", os.sep))).unlink(missing_ok=True)
        self.extensions.clear()

    def build_extension(self, ext: Extension) -> None:
        """Compile and link the extension with ninja."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # one folder for every Python and every kind of install: a second one compiles nothing anew
        kind = "sanitize" if os.environ.get("ERNET_SANITIZE") else "release"
        folder = ROOT / "build" / f"temp.{sysconfig.get_platform()}" / kind
        if optimization() != "3":
            folder = ROOT / "build" / f"quick.O{optimization()}" / kind
        folder.mkdir(parents=True, exist_ok=True)
        loops_only = os.environ.get("ERNET_LOOPS_ONLY") == "1"
        script = NinjaLoops(folder) if loops_only else NinjaScript(folder, target, self.distribution.get_version())
        path = folder / "build.ninja"
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        print(f"ernet_fast: compiling for {script.described()}, {jobs} compilers at a time", flush=True)
        with alone(folder):
            text = script.text()
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
            subprocess.run([*ninja_command(), "-f", str(path), "-j", jobs, "--quiet"], cwd=ROOT, check=True)


def ninja_command() -> list[str]:
    """The ninja of this Python environment, else the one on the PATH."""
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    found = shutil.which("ninja")
    if found is None:
        raise SystemExit("ernet_fast: ninja is needed to build. Install it: pip install ninja")
    return [found]


class NinjaLoops:
    """The text of build.ninja for the loops, which know nothing of torch: which files, which flags."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cxx = find_compiler()
        self.isas = instruction_sets(folder)
        self.objects: list[str] = []
        self.lines: list[str] = []

    def described(self) -> str:
        """What the loops will run on."""
        return f"CPUs ({' '.join(self.isas)})"

    def text(self) -> str:
        """The whole file. What takes longest comes first, so that no compiler is left alone at the end."""
        self._rules()
        for source in by_size(CSRC.rglob("*.cpp")):
            if is_loop(source):
                self._compile_per_isa(source)
        return "\n".join(self.lines) + "\n"

    def _sanitize(self) -> str:
        sanitize = os.environ.get("ERNET_SANITIZE")
        return f" -fsanitize={sanitize} -fno-omit-frame-pointer -g" if sanitize else ""

    def _rules(self) -> None:
        werror = " -Werror" if os.environ.get("ERNET_WERROR", "0") == "1" else ""
        # not for nvcc: of several architectures ccache looks at one, and takes code changed for another for known
        launcher = "ccache " if shutil.which("ccache") and "ccache" not in str(self.cxx) else ""
        common = f"-O{optimization()} -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra{werror} -I{CSRC.name}"
        self.lines += [
            "ninja_required_version = 1.8",
            f"builddir = {escape(self.folder)}",
            "rule cxx",
            f"  command = {launcher}{self.cxx} {common}{self._sanitize()} $extra -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]

    def _compile_per_isa(self, source: Path) -> None:
        folder = str(source.parent.relative_to(CSRC))
        for isa, flags in self.isas.items():
            if isa not in SIMD_FOLDERS or folder in SIMD_FOLDERS[isa]:
                extra = [f"-DERNET_ISA={isa}", *flags, "-fno-math-errno", "-fno-trapping-math"]
                if source.name in IN_VECTORS and optimization() == "3":
                    extra += ["-O2", "-fpeel-loops"]
                self._compile(source, "cxx", extra, suffix=f".{isa}")

    def _compile(self, source: Path, rule: str, extra: list[str], suffix: str = "") -> None:
        name = str(source.relative_to(CSRC)).replace(os.sep, "_")
        output = escape(self.folder / f"{name}{suffix}.o")
        self.objects.append(output)
        self.lines += [f"build {output}: {rule} {escape(source.relative_to(ROOT))}", f"  extra = {' '.join(extra)}"]


class NinjaScript(NinjaLoops):
    """The text of build.ninja for the whole library."""

    def __init__(self, folder: Path, target: Path, version: str) -> None:
        super().__init__(folder)
        self.target, self.version = target, version
        self.torch, self.torch_version, torch_has_cuda = torch_location()
        self.nvcc = find_nvcc(torch_has_cuda)
        self.archs = cuda_archs() if self.nvcc else []

    def described(self) -> str:
        """What the library will run on."""
        cuda = f"CUDA {' '.join(self.archs)} (ERNET_CUDA=0 leaves it out)" if self.nvcc else "no CUDA"
        return f"{super().described()}, {cuda}"

    def text(self) -> str:
        """The whole file. What takes longest comes first, so that no compiler is left alone at the end."""
        self._rules()
        for source in by_size(CSRC.rglob("*.cu")) if self.nvcc else ():
            self._compile(source, "nvcc", [])
        for source in by_size(CSRC.rglob("*.cpp")):
            if is_loop(source):
                self._compile_per_isa(source)
            elif source.parent.name == "cuda":
                if self.nvcc:
                    toolkit = f"-isystem {self._toolkit() / 'include'}"
                    self._compile(source, "cxx", [*SAME_BITS, *self._torch(), "-DERNET_WITH_CUDA", toolkit])
            elif source.name == "library.cpp":
                self._compile(source, "cxx", [*self._definitions(), *(["-DERNET_WITH_CUDA"] if self.nvcc else [])])
            else:  # with what is compiled in where this is asked for: the others are compiled once for all such sets
                asks = "ERNET_HAS_" in source.read_text(encoding="utf-8")
                isas = [f"-DERNET_HAS_{isa.upper()}" for isa in self.isas] if asks else []
                self._compile(source, "cxx", [*SAME_BITS, *self._torch(), *isas])
        self.lines.append(f"build {escape(self.target)}: link {' '.join(self.objects)}")
        return "\n".join(self.lines) + "\n"

    def _rules(self) -> None:
        super()._rules()
        links = f"-L{self.torch / 'lib'} -ltorch_cpu"
        if self.nvcc:
            links += f" {self._library('libcudart_static.a')} -ldl -lrt -lpthread"
        gencode = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs)
        if self.archs:  # PTX of the newest plain architecture, so that later GPUs run too
            plain = [a for a in self.archs if a.isdigit()]
            gencode += f" -gencode=arch=compute_{plain[-1]},code=compute_{plain[-1]}" if plain else ""
        self.lines += [
            "rule nvcc",
            # Spills, local memory and every other ptxas warning are errors. A product and a sum are fused where the
            # code says so and nowhere else, so that every kernel rounds as the C++ of the CPU does. The binary keeps
            # line numbers, for profilers and the counts of `dev.py kernels`; compressed, they cost little.
            f"  command = {self.nvcc} -O3 -std=c++17 -fmad=false {gencode} -lineinfo -Xfatbin=-compress-all "
            f"-I{CSRC.name} -Xcompiler -fPIC,-fvisibility=hidden "
            "-Xptxas -warn-spills,-warn-lmem-usage,-Werror -Werror all-warnings -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {self.cxx} -shared{self._sanitize()} $in -o $out {links}",
        ]

    def _definitions(self) -> list[str]:
        values = {
            "ERNET_VERSION": self.version,
            "ERNET_ISA_VARIANTS": ";".join(self.isas),
            "ERNET_CUDA_ARCHS": ";".join(self.archs),
            "ERNET_TORCH_HEADERS": self.torch_version,
            "ERNET_SANITIZE": os.environ.get("ERNET_SANITIZE", ""),
        }
        return [shlex.quote(f'-D{key}="{value}"') for key, value in values.items()]

    def _torch(self) -> list[str]:
        """What sources need that include torch's headers."""
        return [f"-DTORCH_TARGET_VERSION={TARGET_TORCH}", f"-isystem {self.torch / 'include'}"]

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


def is_loop(source: Path) -> bool:
    """True for a file in an operation's simd/ folder, which is compiled once for each instruction set."""
    folder = source.parent.relative_to(CSRC)
    return folder.name == "simd" and len(folder.parts) > 1


def by_size(sources: Iterable[Path]) -> list[Path]:
    """The largest first."""
    return sorted(sources, key=lambda source: (-source.stat().st_size, source))


def escape(path: Path) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    ext_modules=[Extension("ernet_fast.libernet", sources=[])],
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": LibraryWheel},
)
