""".ci/check_kernels.py on what cuobjdump prints of made-up kernels."""

from __future__ import annotations

import check_kernels
import pytest

USAGE = """
Fatbin elf code:
================
arch = sm_75
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0 CONSTANT[4]:1024
 Function reconstruct_kernel:
  REG:40 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function begin_kernel:
  REG:128 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

Resource usage:
 Function reconstruct_kernel:
  REG:48 STACK:0 SHARED:2048 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
CODE = """
Fatbin elf code:
================
arch = sm_75
\t\tFunction : reconstruct_kernel
        /*0070*/                   LDG.E.128.CONSTANT.SYS R8, [R2+0x10] ;      /* 0x00 */
        /*0080*/              @!P0 STG.E.128.SYS [R2], R4 ;                    /* 0x00 */
\t\tFunction : begin_kernel
        /*0090*/                   LDG.E.64.SYS R8, [R2+0x10] ;                /* 0x00 */
        /*00a0*/                   LDS.128 R8, [R2+0x10] ;                     /* 0x00 */
\t\tFunction : a_device_function
        /*0000*/                   LDG.E.128 R8, [R2] ;                        /* 0x00 */

Fatbin elf code:
================
arch = sm_90a
\t\tFunction : reconstruct_kernel
        /*0070*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;   /* 0x00 */
        /*0080*/                   STG.E.U8 desc[UR4][R2.64], R4 ;             /* 0x00 */
"""
NAMED = ("separate_kernel", "resident_kernel", "resident_kernel<BlockCluster>")


@pytest.fixture
def kernels():
    """Those of the listings, and one of every name that the check knows, without a fault."""
    others = [check_kernels.Kernel(name, "sm_80", 4, 0, 0, 0, {"LDG", "STG"}) for name in NAMED]
    return [*check_kernels.parse(USAGE, CODE), *others]


def test_listings_are_read(kernels):
    found = [(one.name, one.arch, one.registers, one.shared, one.wide) for one in kernels[:3]]
    assert found == [
        ("reconstruct_kernel", "sm_75", 40, 1024, {"LDG", "STG"}),
        ("begin_kernel", "sm_75", 128, 0, set()),
        ("reconstruct_kernel", "sm_90a", 48, 2048, {"LDG"}),
    ]


def test_narrow_accesses_are_faults(kernels):
    assert check_kernels.faults(kernels) == [
        "begin_kernel for sm_75 has no 16-byte LDG",
        "reconstruct_kernel for sm_90a has no 16-byte STG",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stack": 8}, "spills: 8 bytes of stack, 0 of local memory"),
        ({"local": 16}, "spills: 0 bytes of stack, 16 of local memory"),
        ({"registers": 129}, "uses 129 registers, more than 128"),
    ],
)
def test_spills_and_registers_are_faults(kernels, change, said):
    sound = [one for one in kernels if not any(one.name in fault for fault in check_kernels.faults(kernels))]
    assert sound
    sound = [kernels[0], *sound]
    for key, value in change.items():
        setattr(kernels[0], key, value)
    assert check_kernels.faults(sound) == [f"reconstruct_kernel for sm_75 {said}"]


def test_clusters_are_compiled_to_nothing_before_9_0():
    old, new = (
        check_kernels.Kernel("resident_kernel<BlockCluster, true>", arch, 4, 0, 0, 0) for arch in ("sm_86", "sm_90a")
    )
    assert old.wanted == set() and new.wanted == {"LDG", "STG"}
    assert check_kernels.Kernel("resident_kernel<OneBlock, true>", "sm_75", 4, 0, 0, 0).wanted == {"LDG", "STG"}


def test_a_name_that_no_kernel_has_is_a_fault(kernels):
    (fault,) = set(check_kernels.faults([one for one in kernels if "separate" not in one.name])) - set(
        check_kernels.faults(kernels)
    )
    assert fault.startswith("no kernel is called separate_kernel")


def test_without_objects_nothing_passes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(check_kernels, "ROOT", tmp_path)
    assert check_kernels.main() == 1 and "no CUDA objects" in capsys.readouterr().out
