"""The Triton kernels compiled ahead of time, without a GPU: registers, spills, width of loads, number of variants.

What is compiled is what calls on maps of real networks would launch: see triton_launches.py.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from triton_launches import Launch, record

from ernet_fast.er.epilogue_arguments import TABLE_ROWS, BranchNorm
from ernet_fast.er.triton import coefficient_launch, map_launch

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") == "1", reason="TRITON_INTERPRET=1 compiles nothing"),
]

ARCHITECTURES = [80, 90, 100, 120]
# Registers of a thread: 65,536 of a multiprocessor hold at least 512 threads of a sum, 384 of a reduction.
REGISTERS = {
    "weighted_sum_kernel": 128,
    "map_dots_kernel": 168,
    "channel_moments_kernel": 168,
    "merge_dot_kernel": 128,
    "merge_moments_kernel": 128,
    "block_coefficients_kernel": 128,
    "map_coefficients_backward_kernel": 128,
}
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", re.MULTILINE)


class Machine(NamedTuple):
    """A kernel's machine code: registers of a thread, bytes of stack and of shared memory, instructions in order."""

    registers: int
    stack: int
    shared: int
    instructions: list[str]

    def positions(self, prefix: str) -> list[int]:
        return [i for i, name in enumerate(self.instructions) if name.startswith(prefix)]

    def widths(self, prefix: str) -> set[str]:
        """Bits of the loads or stores: 128 for LDG.E.128, 32 where the name says nothing."""
        names = {self.instructions[i] for i in self.positions(prefix)}
        return {next((part for part in name.split(".") if part in ("128", "64", "U16", "U8")), "32") for name in names}


def compile_for(launch: Launch, architecture: int, folder: Path) -> Machine:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ernet_fast.er.triton import coefficient_kernels, map_kernels

    kernel = getattr(coefficient_kernels if "coefficients" in launch.kernel else map_kernels, launch.kernel)
    constants = dict(launch.constants)
    options = {"num_warps": constants.pop("num_warps", 4)}
    constants |= {name: None for name, x in zip(kernel.arg_names, launch.arguments, strict=False) if x is None}
    signature = dict(zip(kernel.arg_names, launch.types(), strict=False)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants, launch.alignments())
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def dump(what: str) -> str:
        return subprocess.run([tool, what, cubin], capture_output=True, text=True, check=True).stdout

    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", dump("-res-usage"))
    assert usage, "cuobjdump shows no resources"
    registers, stack, shared, local = map(int, usage.groups())
    return Machine(registers, stack + local, shared, INSTRUCTION.findall(dump("-sass")))


def stage(dtype: torch.dtype, layout: torch.memory_format, num_maps: int, size: int = 56) -> Callable[[], Any]:
    """The four operators on maps of ER-ResNet-50's first stage at batch 256, or of its size."""
    x = torch.empty((256, 256, size, size), dtype=dtype, device="meta").contiguous(memory_format=layout)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = torch.empty(num_maps, 256, dtype=acc, device="meta"), torch.empty(256, dtype=acc, device="meta")

    def call() -> None:
        map_launch.weighted_sum([x] * num_maps, a, b, True)
        map_launch.weighted_dot(x, [x] * num_maps, x, False)
        map_launch.map_dots(x, x, x, [x] * num_maps)
        map_launch.channel_moments(x, False)

    return call


def check_scalars(launch: Launch) -> None:
    """No number is passed as a float: Triton makes a float32 of it, and the algebra is in float64."""
    assert "fp32" not in launch.types(), f"{launch.kernel} takes {launch.types()}"


def check(launch: Launch, machine: Machine, channels_last: bool) -> None:
    name = launch.kernel
    check_scalars(launch)
    assert machine.stack == 0 and not machine.positions("LDL") and not machine.positions("STL"), f"{name} spills"
    assert machine.registers <= REGISTERS[name], f"{name} needs {machine.registers} registers"
    if name.startswith("merge"):
        return
    loads, stores = machine.widths("LDG"), machine.widths("STG")
    maps = next((len(argument) for argument in launch.arguments if isinstance(argument, tuple)), 8)
    assert len([i for i in machine.positions("LDG") if "128" in machine.instructions[i]]) >= maps, name
    if name == "weighted_sum_kernel":
        # Planar: a row has one coefficient, a load of 4 or 8 bytes.
        acc = "64" if launch.arguments[1].dtype == torch.float64 else "32"
        assert loads == {"128"} if channels_last else loads == {"128", acc}, (name, loads)
        assert stores == {"128"} and machine.shared == 0 and not machine.positions("BAR"), (name, stores)
        return
    assert loads == {"128"}, (name, loads)
    assert name == "channel_moments_kernel" or "128" in stores, (name, stores)  # of g
    # The loop over tiles waits for nobody: barriers only in the reduction that follows it.
    assert max(machine.positions("LDG")) < min(machine.positions("BAR")), name


def algebra(
    index: int,
    num_maps: int,
    *,
    running: bool = False,
    elements: int = 256 * 56 * 56,
    dtype: torch.dtype = torch.float32,
    spread: bool = False,
) -> Callable[[], Any]:
    """The algebra of block `index` of a stage of `num_maps` maps of 256 channels, in training or evaluation.

    `dtype`: of parameters and running statistics. `spread`: over processes, with cumulative averages.
    """
    x = torch.empty((1, 256, 1, 1), dtype=dtype, device="meta")
    table = x.new_empty((num_maps, TABLE_ROWS, 256), dtype=torch.float64)
    one, rows = x.new_empty(256), x.new_empty(index, 256)
    norm, number = (
        (BranchNorm.RUNNING if running else BranchNorm.BATCH),
        torch.empty((), dtype=torch.int64, device="meta"),
    )
    counted = (None, None) if running else (number, number)
    doubles, momentum = dtype == torch.float64, None if spread else 0.1
    a = torch.empty((num_maps, 256), dtype=torch.float64 if doubles else torch.float32, device="meta")
    measured = (None, None) if running else (a[0], a[0])
    count = table.new_empty(1) if spread else None

    def call() -> None:
        coefficient_launch.block_coefficients(
            table, index, doubles, *measured, count, elements, norm, one, one, one, one, counted[0], momentum,
            1e-5, rows, rows, rows, counted[1], running, momentum, 1e-5,
        )  # fmt: skip
        later = range(index + 1, num_maps)
        lists = {
            "later_a": [a.new_empty(k + 1, 256) for k in later],
            "later_db": [a.new_empty(256, dtype=torch.float64) for _ in later],
            "later_weight": [x.new_empty(k, 256) for k in later],
            "later_running_mean": [x.new_empty(k if running else 0, 256) for k in later],
            "later_running_var": [x.new_empty(k if running else 0, 256) for k in later],
            "later_dweight": [a.new_empty(k, 256) for k in later],
        }
        coefficient_launch.map_coefficients_backward(
            table, index, sums=a.new_empty(len(later) + 2, 256).double(), a=a[: index + 1], **lists, count=count,
            elements=elements, norm=norm, eps=1e-5, measured=not running, pass_on=False,
        )  # fmt: skip

    return call


CASES = [
    *((torch.bfloat16, torch.channels_last, architecture) for architecture in ARCHITECTURES),
    (torch.float32, torch.channels_last, 90),
    (torch.float64, torch.channels_last, 90),
    (torch.bfloat16, torch.contiguous_format, 90),
    (torch.float32, torch.contiguous_format, 100),
]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "layout", "architecture"), CASES)
def test_machine_code(dtype, layout, architecture, monkeypatch, tmp_path):
    launches = record(monkeypatch, stage(dtype, layout, 6))
    assert len(launches) == 7
    for launch in launches:
        check(launch, compile_for(launch, architecture, tmp_path), layout == torch.channels_last)


def check_algebra(launches: list[Launch], architecture: int, folder: Path) -> None:
    """One launch each way, nothing spilled, no barrier: channels are independent.

    Loads are of one value a thread, its channel's, and of 4 or 8 bytes: neighbouring threads read neighbouring
    channels, so a warp reads whole lines. Wider loads would leave a map of 256 channels to a single warp.
    """
    assert [launch.kernel for launch in launches] == ["block_coefficients_kernel", "map_coefficients_backward_kernel"]
    for launch in launches:
        check_scalars(launch)
        machine = compile_for(launch, architecture, folder)
        assert machine.stack == 0 and not machine.positions("LDL") and not machine.positions("STL"), launch.kernel
        assert machine.registers <= REGISTERS[launch.kernel], (launch.kernel, machine.registers)
        assert machine.shared == 0 and not machine.positions("BAR"), launch.kernel
        assert machine.widths("LDG") <= {"32", "64", "U16"} and machine.widths("STG") <= {"32", "64", "U16"}


@pytest.mark.slow
@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code_of_the_algebra(architecture, running, monkeypatch, tmp_path):
    check_algebra(record(monkeypatch, algebra(3, 6, running=running)), architecture, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_machine_code_of_the_algebra_in_other_dtypes(dtype, monkeypatch, tmp_path):
    """Also with statistics over processes, whose count is on the device, and cumulative averages."""
    check_algebra(record(monkeypatch, algebra(3, 6, dtype=dtype, spread=True)), 90, tmp_path)


def of_maps(index: int, num_maps: int, dtype: torch.dtype, size: int) -> Callable[[], Any]:
    """Map `index` of a stage of 256 channels, batch 64: its reductions, each with the algebra that merges it."""
    z = torch.empty((64, 256, size, size), dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    one, rows = (torch.empty(sizes, dtype=acc, device="meta") for sizes in ((256,), (index, 256)))
    table = one.new_empty((num_maps, TABLE_ROWS, 256), dtype=torch.float64)
    number = torch.empty((), dtype=torch.int64, device="meta")
    later = range(index + 1, num_maps)

    def call() -> None:
        coefficient_launch.measured_coefficients(
            z, table, index, BranchNorm.BATCH, one, one, one, one, number, 0.1, 1e-5, rows, rows, rows, number, False,
            0.1, 1e-5,
        )  # fmt: skip
        coefficient_launch.map_backward(
            z, z, z, [z for _ in later], table, index, one.new_empty(index + 1, 256),
            [one.new_empty(k + 1, 256) for k in later], [one.double() for _ in later],
            *([one.new_empty(k, 256) for k in later], *([one.new_empty(0, 256) for _ in later] for _ in range(2))),
            [one.new_empty(k, 256) for k in later], BranchNorm.BATCH, 1e-5, True, False,
        )  # fmt: skip

    return call


# float32 vectors on every architecture, float64 ones, and the slabs of small maps, of which there is one
MERGING = [*((torch.bfloat16, 56, arch) for arch in ARCHITECTURES), (torch.float64, 56, 90), (torch.bfloat16, 1, 90)]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "size", "architecture"), MERGING)
def test_machine_code_of_the_algebra_that_merges_slabs(dtype, size, architecture, monkeypatch, tmp_path):
    """Two launches each way, the second with many loads in flight: nothing of it is spilled."""
    launches = record(monkeypatch, of_maps(3, 10, dtype, size))
    assert [launch.kernel.removesuffix("_kernel") for launch in launches] == [
        "channel_moments", "block_coefficients", "map_dots", "map_coefficients_backward"
    ]  # fmt: skip
    for launch in launches[1::2]:
        assert launch.constants["SLABS"] == (128 if size > 1 else 1)
        check_scalars(launch)
        machine = compile_for(launch, architecture, tmp_path)
        assert machine.stack == 0 and not machine.positions("LDL") and not machine.positions("STL"), launch.kernel
        # a program a multiprocessor: registers are for loads in flight
        assert machine.registers <= 168, (launch.kernel, machine.registers)


@pytest.mark.slow
def test_the_algebra_of_more_than_32_bits_of_values(monkeypatch, tmp_path):
    for launch in record(monkeypatch, algebra(1, 2, elements=2**31)):
        assert "i64" in launch.types() and compile_for(launch, 90, tmp_path).stack == 0


def test_few_variants_of_the_algebra(monkeypatch):
    """Maps 1 to 39 of one stage: one variant forward, five backward.

    Those are 2, 4, 8 and 16 later blocks in the last launch, and 16 in launches before it.
    """
    variants: dict[str, set[Any]] = {}
    for index in range(1, 40):
        for launch in record(monkeypatch, algebra(index, 40)):
            variants.setdefault(launch.kernel, set()).add(launch.specialisation())
    assert {name: len(found) for name, found in variants.items()} == {
        "block_coefficients_kernel": 1,
        "map_coefficients_backward_kernel": 5,
    }


@pytest.mark.slow
def test_machine_code_of_many_maps(monkeypatch, tmp_path):
    """23 maps, the third stage of ER-ResNet-101: one sum in groups of 8 maps, three launches of each dot."""
    launches = record(monkeypatch, stage(torch.bfloat16, torch.channels_last, 23, size=14))
    names = [launch.kernel for launch in launches]
    assert names.count("map_dots_kernel") == 2 * 3
    further = launches[names.index("map_dots_kernel") + 1]
    assert further.arguments[1] is None  # dy
    machine = compile_for(further, 90, tmp_path)
    assert machine.registers <= REGISTERS["map_dots_kernel"] and machine.stack == 0
    check(launches[0], compile_for(launches[0], 90, tmp_path), True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("with_dy", "with_y", "num_later"), [(True, True, 0), (True, False, 8), (False, False, 3)])
def test_machine_code_of_map_dots(dtype, with_dy, with_y, num_later, monkeypatch, tmp_path):
    """Of the last block of a stage, of a block without ReLU, of a map that no block made."""
    x = torch.empty((256, 256, 56, 56), dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    own = (x if with_dy else None, x if with_y else None)
    launches = record(monkeypatch, lambda: map_launch.map_dots(x, *own, [x] * num_later))
    assert [launch.kernel for launch in launches] == ["map_dots_kernel", "merge_dot_kernel"]
    machine = compile_for(launches[0], 90, tmp_path)
    assert machine.registers <= REGISTERS["map_dots_kernel"] and machine.stack == 0
    assert machine.widths("LDG") == {"128"} and max(machine.positions("LDG")) < min(machine.positions("BAR"))
    assert ("128" in machine.widths("STG")) is with_y


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_maps_beyond_32_bits_compile(layout, monkeypatch, tmp_path):
    """More than 2^31 pixels a channel: sizes become 64-bit arguments, and offsets in a planar tile too."""
    x = torch.empty((1, 8, 1 << 16, 1 << 15), dtype=torch.bfloat16, device="meta").contiguous(memory_format=layout)

    def call() -> None:
        map_launch.weighted_sum([x, x], torch.empty(2, 8, device="meta"), None, False)
        map_launch.weighted_dot(x, [x, x], x, False)
        map_launch.map_dots(x, x, x, [x, x])
        map_launch.channel_moments(x, False)

    launches = record(monkeypatch, call)
    for launch in launches:
        assert 0 < launch.grid[0] < 2**31
        if not launch.kernel.startswith("merge"):
            assert "i64" in launch.types()
            assert launch.constants["WIDE"] is (layout == torch.contiguous_format)
        # 64-bit indices may cost the odd register too many here, not more.
        assert compile_for(launch, 90, tmp_path).stack <= 64


def test_few_variants(monkeypatch):
    """Counts of maps from 1 to 40: 6 variants of the sum; 9 of the dots, 3 a first launch and 3 for the others."""
    variants: dict[str, set[Any]] = {}
    for num_maps in range(1, 41):
        for launch in record(monkeypatch, stage(torch.bfloat16, torch.channels_last, num_maps)):
            variants.setdefault(launch.kernel, set()).add(launch.specialisation())
    assert {name: len(found) for name, found in variants.items()} == {
        "weighted_sum_kernel": 6,
        "map_dots_kernel": 9,
        "merge_dot_kernel": 2,  # weighted_dot's sums are float32
        "channel_moments_kernel": 1,
        "merge_moments_kernel": 1,
    }


class _Driver:
    """Stands in for the CUDA driver: Triton compiles for it, and what it would launch is kept."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, int, tuple[Any, ...]]] = []
        self.utils = self

    def get_current_device(self) -> int:
        return 1000  # whose kernels are kept apart from those of real devices

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 20}

    def load_binary(self, *arguments: Any) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda x, y, z, *rest: self.launched.append((metadata.name, x, rest[6:]))


@pytest.mark.slow
def test_calls_reach_the_driver(monkeypatch):
    """Through Triton's own argument handling, up to the launch: what it is given, and one compilation a variant."""
    import triton

    from ernet_fast.er.triton import map_kernels

    driver = _Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(map_launch, "_interpreted", lambda: True)
    maps = [torch.zeros(2, 64, 4, 4).contiguous(memory_format=torch.channels_last) for _ in range(10)]

    def pointers(arguments: tuple[Any, ...]) -> list[int]:
        return [x.data_ptr() for x in next(a for a in arguments if isinstance(a, tuple))]

    for count, padded in ((3, 4), (4, 4), (7, 8), (8, 8)):
        y = map_launch.weighted_sum(maps[:count], torch.ones(count, 64), torch.ones(64), True)
        name, programs, arguments = driver.launched.pop()
        assert (name, programs) == ("weighted_sum_kernel", 1)  # 32 pixels of 64 channels
        assert pointers(arguments) == [x.data_ptr() for x in maps[:count]] + [maps[0].data_ptr()] * (padded - count)
        assert arguments[3].data_ptr() == y.data_ptr() and arguments[4] == count
    compiled = map_kernels.weighted_sum_kernel.device_caches[1000][0]
    assert len(compiled) == 2

    def wide_loads() -> int:
        return list(compiled.values())[-1].asm["ptx"].count("ld.global.v4.b32")

    # a map that starts between two multiples of 16 bytes: its two loads, and only its, are narrow
    aligned = wide_loads()
    odd = torch.zeros(2 * 4 * 4 * 64 + 1)[1:].view(2, 4, 4, 64).permute(0, 3, 1, 2)
    map_launch.weighted_sum([*maps[:7], odd], torch.ones(8, 64), torch.ones(64), True)
    assert len(compiled) == 3 and wide_loads() == aligned - 2
    driver.launched.clear()
    map_launch.weighted_dot(maps[0], maps, maps[1], False)
    map_launch.channel_moments(maps[0], True)
    names = [name for name, _, _ in driver.launched]
    assert names == ["map_dots_kernel"] * 2 + ["merge_dot_kernel", "channel_moments_kernel", "merge_moments_kernel"]
    first, second = (arguments for _, _, arguments in driver.launched[:2])
    assert pointers(first) == [x.data_ptr() for x in maps[:8]]
    assert pointers(second) == [x.data_ptr() for x in maps[8:]]
    assert second[0].data_ptr() == first[3].data_ptr()  # g, which the first launch wrote, is what the second reads
