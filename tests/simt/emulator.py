"""Builds the CUDA kernels for the CPU emulator and calls them through ctypes; needs NumPy only, no torch."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA = ROOT / "csrc" / "macenko" / "cuda"
SOURCES = [
    HERE / "simt.cpp",  # first: of functions that several objects hold the linker keeps its own
    *sorted(CUDA.glob("*.cu")),
    CUDA / "plan.cpp",
    HERE / "planted.cu",
    HERE / "macenko_entry.cpp",
]


class Images(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int),
        *[(name, ctypes.c_int64) for name in ("count", "pixels", "image_stride", "channel_stride", "pixel_stride")],
        ("scale", ctypes.c_double),
    )


class Stains(ctypes.Structure):
    _fields_ = (("stain", ctypes.c_void_p), ("maximum", ctypes.c_void_p), ("shared", ctypes.c_bool))


class Parameters(ctypes.Structure):
    _fields_ = (*[(name, ctypes.c_double) for name in ("io", "alpha", "beta")], ("nearest", ctypes.c_bool))


class FitResult(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("stain", "maximum", "status"))


class Output(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("image_stride", ctypes.c_int64),
        ("channel_stride", ctypes.c_int64),
        ("type", ctypes.c_int),
        ("range", ctypes.c_double),
        ("mean", ctypes.c_double * 3),
        ("std", ctypes.c_double * 3),
    )


class Recipe(ctypes.Structure):
    _fields_ = (
        ("source", Stains),
        ("status", ctypes.c_void_p),
        ("target", Stains),
        ("identity", ctypes.c_bool),
        ("gain", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
    )


class Separation(ctypes.Structure):
    _fields_ = (
        ("source", Stains),
        ("drawn", Stains),
        ("scaled", ctypes.c_bool),
        ("drawing", Output * 3),
        ("concentrations", ctypes.c_void_p),
    )


class Device(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_int),
        ("multiprocessors", ctypes.c_int),
        ("block_shared_bytes", ctypes.c_int64),
        ("cache_bytes", ctypes.c_int64),
    )


class Plan(NamedTuple):
    """As in csrc/macenko/cuda/plan.h; kind is a number of PLANS."""

    kind: int
    blocks: int
    threads: int
    table_shift: int
    shared_bytes: int
    listed: int


PLANS = {"automatic": 0, "streaming": 1, "resident": 2, "cluster": 3}
H200 = Device(9, 132, 232448, 50 << 20)


class Fit(NamedTuple):
    """Arrays [B, 3, 2], [B, 2] and [B]."""

    stain: np.ndarray
    maximum: np.ndarray
    status: np.ndarray

    @classmethod
    def empty(cls, count: int) -> Fit:
        """Filled with what no fit returns."""
        return cls(np.full((count, 3, 2), -7.0), np.full((count, 2), -7.0), np.full(count, -7, np.int32))

    def pointers(self) -> FitResult:
        return FitResult(*(part.ctypes.data for part in self))


class Lists(NamedTuple):
    """Of all fits since the emulator was made: times that statistics were sought in a list, keys, pixels, failures."""

    rounds: int
    keys: int
    listed: int
    missed: int


class Network(NamedTuple):
    """Output for a network: dtype (float32, float16, or uint16 for the bits of bfloat16), mean and std."""

    dtype: type
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    kind: int


def missing_tools() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if not CUDA.is_dir():
        return "the CUDA sources are not beside the tests"
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if cuda_include() is None:
        return "the CUDA headers are not installed (set CUDA_HOME)"
    return None


def cuda_include() -> Path | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "include" / "cuda_runtime.h").exists():
            return Path(home) / "include"
    return None


def build(folder: Path, sanitize: str | None = None) -> Path:
    """Compile the same .cu files that nvcc compiles, with g++."""
    flags = ["-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
    checks = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"] if sanitize else []
    includes = [f"-I{ROOT / 'csrc'}", f"-I{HERE}", "-isystem", str(cuda_include()), "-include", str(HERE / "simt.h")]

    def compiled(source: Path) -> Path:
        # what orders threads is told by the scheduler, whose own accesses are none of a kernel's
        own = ["-DSIMT_RACES=1"] if sanitize == "thread" and source.name == "simt.cpp" else checks
        return compile_with([*flags, *own, *includes, "-x", "c++", "-c"], source, folder)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, SOURCES))
    flags += checks
    library = folder / "libernet_simt.so"
    # its own functions of the CUDA runtime, also where a torch with CUDA has loaded the real ones
    run_compiler(["-shared", "-Wl,-Bsymbolic", *flags, *map(str, objects), "-o", str(library)])
    return library


def compile_with(arguments: list[str], source: Path, folder: Path) -> Path:
    target = folder / f"{source.name}.o"
    run_compiler([*arguments, str(source), "-o", str(target)])
    return target


def run_compiler(arguments: list[str]) -> None:
    done = subprocess.run(["g++", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the kernels do not compile for the emulator:\n{done.stderr}")


class Emulator:
    """The launchers of csrc/macenko/cuda/kernels.h on NumPy arrays."""

    def __init__(self, library: Path, seed: int = 0) -> None:
        self.lib = ctypes.CDLL(str(library))
        self.lib.simt_streaming_workspace.restype = ctypes.c_int64
        self.lib.simt_seed(ctypes.c_uint64(seed))

    def lists(self) -> Lists:
        """What the resident and cluster plans have listed."""
        numbers = (ctypes.c_int64 * 4)()
        self.lib.simt_lists(numbers)
        return Lists(*numbers)

    def reconstruct(
        self,
        images,
        source,
        target,
        io: float = 240,
        scale: float = 1,
        network: Network | None = None,
        changes: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Images reconstructed; source and target are pairs of float64 arrays [1 or B, 3, 2] and [1 or B, 2]."""
        what = describe(images, scale)
        out, to = output_for(images, scale, network)
        gain, shift = (part.ctypes.data for part in changes) if changes else (None, None)
        recipe = Recipe(stains(source), None, stains(target), False, gain, shift)
        error = self.lib.simt_reconstruct(
            ctypes.byref(what), ctypes.byref(recipe), ctypes.c_double(io), ctypes.byref(to)
        )
        assert error == 0
        return out

    def separate(self, images, source, drawn, scaled: bool, io: float = 240, scale: float = 1) -> list[np.ndarray]:
        """Haematoxylin, eosin, and concentrations [B, 2, H, W]; stains as in `reconstruct`."""
        drawings, outputs = zip(*(output_for(images, scale, None) for _ in range(2)), strict=True)
        amounts = np.full((len(images), 2, *images.shape[2:]), -7, np.float32)
        what = Separation(stains(source), stains(drawn), scaled, (Output * 3)(*outputs), amounts.ctypes.data)
        self._separate(images, what, io, scale)
        return [*drawings, amounts]

    def reconstruct_stains(self, images, source, target, io: float = 240, scale: float = 1) -> list[np.ndarray]:
        """Haematoxylin alone, eosin alone, and both; stains as in `reconstruct`."""
        drawings, outputs = zip(*(output_for(images, scale, None) for _ in range(3)), strict=True)
        self._separate(
            images, Separation(stains(source), stains(target), True, (Output * 3)(*outputs), None), io, scale
        )
        return list(drawings)

    def _separate(self, images, what: Separation, io: float, scale: float) -> None:
        error = self.lib.simt_separate(ctypes.byref(describe(images, scale)), ctypes.byref(what), ctypes.c_double(io))
        assert error == 0

    def choose_plan(
        self, images, wanted: str = "automatic", blocks: int = 0, network: bool = False, device: Device = H200
    ) -> Plan:
        """The plan for images like these."""
        numbers = (ctypes.c_int64 * 6)()
        self.lib.simt_choose_plan(
            ctypes.byref(device), ctypes.byref(describe(images, 1)), network, PLANS[wanted], blocks, numbers
        )
        return Plan(*numbers)

    def normalize(
        self,
        images,
        plan: Plan | None = None,
        target=None,
        parameters: tuple = (240, 1, 0.15, False),
        scale: float = 1,
        cache: int = 1 << 20,
        identity: bool = False,
        network: Network | None = None,
        multiprocessors: int = 32,
        changes: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> tuple[np.ndarray | None, Fit]:
        """Fit, by the streaming plan if none is given, and reconstruction if there is a target.

        Parameters are Io, alpha, beta, nearest; changes the gain and the shift of an augmentation, [B, 2] both.
        """
        what, fit = describe(images, scale), Fit.empty(len(images))
        result, to, recipe = None, None, None
        if target is not None:
            result, out = output_for(images, scale, network)
            gain, shift = (part.ctypes.data for part in changes) if changes else (None, None)
            to, how = ctypes.byref(out), Recipe(Stains(), None, stains(target), identity, gain, shift)
            recipe = ctypes.byref(how)
        common = ctypes.byref(what), ctypes.byref(Parameters(*parameters))
        if plan is None or plan.kind == PLANS["streaming"]:
            workspace = self._workspace(what, cache)
            before = ctypes.c_int64(cache), pointer(workspace)
            call = self.lib.simt_streaming
        else:
            before = (ctypes.c_int64 * 6)(*plan), multiprocessors
            call = self.lib.simt_resident
        error = call(*common, *before, ctypes.byref(fit.pointers()), recipe, to)
        if error:
            raise RuntimeError(f"CUDA error {error}")
        return result, fit

    def fit(self, images, parameters: tuple = (240, 1, 0.15, False), **options) -> Fit:
        """A fit alone; options as in `normalize`."""
        return self.normalize(images, parameters=parameters, **options)[1]

    def _workspace(self, what: Images, cache: int) -> np.ndarray:
        return np.full(self.lib.simt_streaming_workspace(ctypes.byref(what), ctypes.c_int64(cache)), 0xA5, np.uint8)


def stains(pair) -> Stains:
    stain, maximum = pair
    assert stain.dtype == maximum.dtype == np.float64
    return Stains(stain.ctypes.data, maximum.ctypes.data, len(stain) == 1)


def output_for(images: np.ndarray, scale: float, network: Network | None) -> tuple[np.ndarray, Output]:
    """An array filled with what no result holds everywhere, and its description."""
    three = ctypes.c_double * 3
    if network is None:
        out = np.empty_like(images)
        out.view(np.uint8).fill(0xA5) if out.flags.c_contiguous else out.fill(77)
        placed = describe(out, scale)
        return out, Output(placed.data, placed.image_stride, placed.channel_stride, 0, 1, three(), three())
    count, _, height, width = images.shape
    out = np.full((count, height, width, 3), 77, network.dtype)
    value_range = 255 if images.dtype == np.uint8 else 255 / scale
    mean, std = three(*network.mean), three(*network.std)
    return out, Output(out.ctypes.data, 0, 0, network.kind, value_range, mean, std)


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def describe(images: np.ndarray, scale: float) -> Images:
    count, _, height, width = images.shape
    strides = [s // images.itemsize for s in images.strides]
    planar = images.flags.c_contiguous
    assert planar or images.transpose(0, 2, 3, 1).flags.c_contiguous
    kind = {np.dtype(np.uint8): 0, np.dtype(np.float32): 1}[images.dtype]
    return Images(images.ctypes.data, kind, count, height * width, strides[0], strides[1], 1 if planar else 3, scale)
