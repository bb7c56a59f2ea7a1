"""What multiprocessors hold and do, by compute capability, and what an H200 has of them.

Sources: CUDA C++ Programming Guide, tables «Technical Specifications per Compute Capability» and «Throughput of Native
Arithmetic Instructions»; Nsight Compute documentation, «Pipelines» (which instructions share a unit); NVIDIA H200
datasheet (4.8 TB/s, 67 TFLOP/s of float32 in 132 multiprocessors of 128 lanes, hence 1.98 GHz).
"""

from __future__ import annotations

from typing import NamedTuple


class Multiprocessor(NamedTuple):
    """The most that can be resident on one multiprocessor."""

    warps: int
    blocks: int
    shared_bytes: int
    shared_bytes_a_block: int
    reserved_bytes_a_block: int


KIB = 1024
REGISTERS = 64 * KIB
REGISTERS_AT_A_TIME = 256  # a warp gets multiples of this
MULTIPROCESSORS = {
    "75": Multiprocessor(32, 16, 64 * KIB, 64 * KIB, 0),
    "80": Multiprocessor(64, 32, 164 * KIB, 163 * KIB, KIB),
    "86": Multiprocessor(48, 16, 100 * KIB, 99 * KIB, KIB),
    "90": Multiprocessor(64, 32, 228 * KIB, 227 * KIB, KIB),
    "100": Multiprocessor(64, 32, 228 * KIB, 227 * KIB, KIB),
    "120": Multiprocessor(48, 24, 100 * KIB, 99 * KIB, KIB),
}

# Results a clock of one multiprocessor of compute capability 9.0.
RATES = {
    "issue": 128,  # four schedulers, an instruction of a warp each
    "fma": 128,  # float32 add, multiply, fused; integer multiply-add in half of the lanes
    "imad": 64,
    "alu": 64,  # integer add, logic, shifts, comparisons, conversions among small types
    "fp64": 64,
    "xu": 16,  # exp2, log2, reciprocal, square root, conversions between integers and floating point
    "shared": 32,  # words of 4 bytes
}


class Device(NamedTuple):
    """A GPU of compute capability 9.0."""

    name: str
    multiprocessors: int
    gigahertz: float
    bytes_a_second: float


H200 = Device("H200", 132, 1.98, 4.8e12)


def resident_blocks(arch: str, threads: int, registers: int, shared: int) -> int | None:
    """Blocks of a kernel that one multiprocessor holds; None for an architecture that is not in the table.

    `shared` is what cuobjdump shows: from 8.0 on with the bytes that the system reserves.
    """
    limits = MULTIPROCESSORS.get(arch.removeprefix("sm_").rstrip("abcdef"))
    if limits is None or threads == 0:
        return None
    warps = -(-threads // 32)
    a_warp = -(-registers * 32 // REGISTERS_AT_A_TIME) * REGISTERS_AT_A_TIME
    # Registers are dealt out to the four parts of a multiprocessor.
    by_registers = 4 * (REGISTERS // 4 // a_warp) // warps if registers else limits.blocks
    by_shared = limits.shared_bytes // max(shared, limits.reserved_bytes_a_block, 1)
    return min(limits.blocks, limits.warps // warps, by_registers, by_shared)
