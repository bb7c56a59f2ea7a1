"""Counting in machine code: loops, the ways through them, what sources say of them, and the tables made of it."""

from __future__ import annotations

import functools
import re

import check_kernels
import kernel_counts
import kernel_prediction
import pixel_passes
import pytest
import sass
from gpu_limits import H200, resident_blocks

LISTING = """
	.section	.text._Zbrighten_u8,"ax",@progbits
	//## File "/somewhere/csrc/cuda/brighten.cu", line 10
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_9) ;
.L_x_1:
	//## File "/somewhere/csrc/cuda/brighten.cu", line 20 inlined at "/somewhere/csrc/cuda/brighten.cu", line 12
	//## File "/somewhere/csrc/cuda/brighten.cu", line 12
        /*0020*/               @P1 BRA P2, `(.L_x_2) ;
	//## File "/somewhere/csrc/cuda/brighten.cu", line 21
        /*0030*/               @P3 LDG.E.U8 R2, desc[UR4][R2.64] ;
        /*0040*/               @P4 LDG.E.U8 R3, desc[UR4][R2.64+0x1] ;
        /*0050*/                   IMAD R3, R3, R3, R3 ;
        /*0060*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0070*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0080*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x10] ;
        /*0090*/                   LDG.E.128 R12, desc[UR4][R2.64+0x20] ;
.L_x_3:
        /*00a0*/                   LDS.U8 R20, [R4] ;
        /*00b0*/               @P5 BRA `(.L_x_4) ;
        /*00c0*/                   FFMA R1, R1, R1, R1 ;
        /*00d0*/                   MUFU.EX2 R1, R1 ;
        /*00e0*/                   ATOMS.POPC.INC.32 RZ, [R1] ;
.L_x_4:
        /*00f0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
	//## File "/somewhere/csrc/cuda/brighten.cu", line 12
        /*0100*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0110*/              @!P0 BRA `(.L_x_1) ;
.L_x_9:
        /*0120*/                   EXIT ;
.L_x_10:
        /*0130*/                   BRA `(.L_x_10);
	.section	.text._Zother,"ax",@progbits
        /*0000*/                   EXIT ;
"""


@pytest.fixture
def kernel():
    one = sass.Kernel("brighten_u8", "sm_90a", 40, 0, 1024, 0, threads=256)
    sass.parse_listing(LISTING.splitlines(), {"_Zbrighten_u8": one})
    return one


def test_instructions_blocks_and_loops(kernel):
    assert [one.opcode for one in kernel.instructions[:3]] == ["LDC", "BRA", "BRA"]
    assert kernel.instructions[2].places == (
        ("/somewhere/csrc/cuda/brighten.cu", 20),
        ("/somewhere/csrc/cuda/brighten.cu", 12),
    )
    assert kernel.instructions[-2].opcode == "EXIT" and len(kernel.instructions) == 20
    (loop,) = kernel.loops  # the branch to itself behind EXIT is never reached
    assert loop.header == 2 and sorted(loop.blocks) == [2, 3, 7, 10, 12, 15]


def test_ways_through_a_loop(kernel):
    (loop,) = kernel.loops
    everything = kernel.way_through(loop, lambda block: True)
    assert everything == [2, 3, 10, 12, 15]
    for longest, way in ((True, [2, 7, 10, 12, 15]), (False, [2, 7, 10, 15])):
        value = functools.partial(kernel_counts.worth, kernel, longest=longest)
        assert kernel.way_through(loop, lambda block: True, value) == way
    assert kernel.way_through(loop, lambda block: block != 15) == []


def test_a_loop_inside_a_loop():
    text = """
	.section	.text.nest,"ax",@progbits
.L_x_1:
        /*0000*/                   IADD3 R0, R0, 0x1, RZ ;
.L_x_2:
        /*0010*/                   LDS R1, [R0] ;
        /*0020*/               @P0 BRA `(.L_x_2) ;
        /*0030*/                   STS [R0], R1 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
    """
    one = sass.Kernel("nest", "sm_90a", 1, 0, 0, 0)
    sass.parse_listing(text.splitlines(), {"nest": one})
    outer, inner = one.loops
    assert outer.blocks == {0, 1, 3} and inner.blocks == {1}
    assert pixel_passes.own_blocks(one, outer) == {0, 3} and pixel_passes.inner_loops(one, outer) == [inner]
    assert one.way_through(outer, lambda block: True) == [0, 1, 3]


def counted(kernel, monkeypatch, **said):
    statement = kernel_counts.Statement(**{"amount": 48, "in_bytes": True, "times": 1, **said})
    monkeypatch.setattr(kernel_counts, "statements", lambda: {("cuda/brighten.cu", 12): statement})
    return list(kernel_counts.pixel_loops([kernel]))


def test_counts_a_pixel(kernel, monkeypatch):
    (loop,) = counted(kernel, monkeypatch)
    assert loop.pixels == 16 and loop.work == "brighten.cu:12"
    assert loop.most["all"] == 12 and loop.fewest == 9
    expected = {"wide loads": 3, "wide stores": 1, "bytes read": 48, "bytes written": 16, "fma": 1, "xu": 1, "alu": 1}
    expected |= {"look-ups": 1, "atomic": 1, "words": 3, "branch": 3, "imad": 0}
    assert {kind: loop.most[kind] for kind in expected} == expected
    assert loop.per_pixel("bytes read") == 3


def test_repeats_multiply_and_unrolled_loops_take_a_multiple(kernel, monkeypatch):
    (once,) = counted(kernel, monkeypatch)
    (thrice,) = counted(kernel, monkeypatch, amount=8, in_bytes=False, times=3)
    assert thrice.pixels == 16 and thrice.per_pixel("all") == 3 * once.per_pixel("all")


def test_a_source_that_contradicts_the_loads_is_an_error(kernel, monkeypatch):
    with pytest.raises(SystemExit, match="says 5 pixels an iteration, the loop loads 16"):
        counted(kernel, monkeypatch, amount=5, in_bytes=False)


def test_a_statement_beside_no_loop_is_an_error(kernel, monkeypatch):
    statement = kernel_counts.Statement(16, False, 1)
    monkeypatch.setattr(kernel_counts, "statements", lambda: {("cuda/brighten.cu", 10): statement})
    with pytest.raises(SystemExit, match=r"cuda/brighten\.cu:10 is no loop"):
        list(kernel_counts.pixel_loops([kernel]))


def test_statements_are_read_from_the_sources():
    found = pixel_passes.statements()
    assert found and all(place[0].endswith((".cu", ".h", ".cuh")) for place in found)
    match = pixel_passes.STATED.search("for (;;) {  // 16 pixels an iteration, 3 times")
    assert match.groups() == ("16", "pixels", "3")
    assert pixel_passes.STATED.search("// 48 bytes of pixels an iteration").groups() == ("48", "bytes of pixels", None)


def test_prediction_names_the_tightest_limit(kernel, monkeypatch):
    (loop,) = counted(kernel, monkeypatch)
    clocks = kernel_prediction.clocks_a_pixel(loop)
    memory = 4 / H200.bytes_a_second * H200.multiprocessors * H200.gigahertz * 1e9
    assert clocks["device memory"] == pytest.approx(memory) == max(clocks.values())
    assert clocks["issue"] == pytest.approx(12 / 16 / 128) and clocks["shared memory"] == pytest.approx(3 / 16 / 32)
    assert kernel_prediction.pixels_a_second(memory) == pytest.approx(4.8e12 / 4)
    random = kernel_prediction.clocks_a_pixel(loop, conflicts=3.5)
    assert random["shared memory"] == pytest.approx((3 + 2.5 * 3) / 16 / 32)


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        ("sm_90a", 256, 64, 1024, 4),
        ("sm_90a", 256, 32, 1024, 8),
        ("sm_90a", 1024, 64, 227 * 1024, 1),
        ("sm_90a", 32, 16, 1024, 32),
        ("sm_90a", 256, 32, 60 * 1024, 3),
        ("sm_75", 256, 64, 0, 4),
        ("sm_86", 256, 40, 1024, 6),
        ("sm_120", 256, 65, 1024, 3),
        ("sm_42", 256, 64, 0, None),
    ],
)
def test_resident_blocks(arch, threads, registers, shared, blocks):
    assert resident_blocks(arch, threads, registers, shared) == blocks


def test_tables_and_their_comparison(kernel, monkeypatch):
    counted(kernel, monkeypatch)
    monkeypatch.setattr(kernel_counts, "nvcc_version", lambda: "13.0.1")
    text = kernel_counts.section([kernel])
    assert "| `brighten_u8` | 256 | 40 / 1.0 / 48 |" in text and "brighten.cu:12 | 16 | 3 / 1 | 3 / 1 |" in text
    assert "| `brighten_u8` | brighten.cu:12 | device memory | 1200 |" in text
    assert kernel_counts.differences(text, text) == []
    assert kernel_counts.differences(text, text.replace("| 40 / ", "| 41 / ")), "the same compiler, another number"
    other = text.replace("13.0.1", "12.9.0").replace("| 40 / ", "| 41 / ")
    assert kernel_counts.differences(text, other) == [], "another compiler may use other registers"
    assert kernel_counts.differences(text, other.replace("brighten_u8", "darken_u8")) == [
        "kernel `brighten_u8`",
        "kernel `darken_u8`",
    ]
    assert kernel_counts.differences(text, re.sub(r"sm_90a \|\n", "sm_80 | sm_90a |\n", text, count=1)) == []


def test_the_page_has_a_place_for_the_tables(kernel, monkeypatch, tmp_path):
    page = tmp_path / "macenko-gpu.md"
    page.write_text(kernel_counts.PAGE.read_text())
    monkeypatch.setattr(kernel_counts, "PAGE", page)
    kernel_counts.write("| `new` |")
    assert kernel_counts.stored() == "| `new` |"
    kernel_counts.write("| `newer` |")
    assert "`new`" not in page.read_text() and page.read_text().count(kernel_counts.END) == 1


def test_kernels_without_16_byte_accesses_are_refused(kernel, capsys):
    kernel.name = "team_kernel<BlockTeam, false>"
    assert check_kernels.check_accesses([kernel]) == 0
    kernel.instructions = [one for one in kernel.instructions if one.opcode != "STG.E.128"]
    assert check_kernels.check_accesses([kernel]) == 1 and "sm_90a: STG" in capsys.readouterr().out
    kernel.name = "begin_kernel<float, true>"  # writes no pixels
    assert check_kernels.check_accesses([kernel]) == 0


SOURCE = """
template <class F>
__device__ void for_all(const F& f) {
  for (int i = 0; i < n; ++i) {  // 16 pixels an iteration
    f(i);
  }
}

__device__ void count_pass(int i) {
  for_all(count);
}

__device__ __forceinline__ void choose(Phase phase) {
  switch (phase) {
    case Phase::angles:
      return count_pass(0);
    case Phase::amounts:
      return count_pass(1);
  }
}

__global__ void __launch_bounds__(256) count_kernel(Job job) {
  choose(job.phase);
}
"""
SWITCH = """
	.section	.text.count,"ax",@progbits
	//## File "/x/csrc/cuda/count.cu", line 24
        /*0000*/                   BRX R4 -0xc0 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*) ;
.L_x_1:
	//## File "/x/csrc/cuda/count.cu", line 4 inlined at "/x/csrc/cuda/count.cu", line 10
	//## File "/x/csrc/cuda/count.cu", line 10 inlined at "/x/csrc/cuda/count.cu", line 16
	//## File "/x/csrc/cuda/count.cu", line 16 inlined at "/x/csrc/cuda/count.cu", line 24
	//## File "/x/csrc/cuda/count.cu", line 24
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0038*/               @P1 BRA `(.L_x_6) ;
.L_x_5:
        /*0040*/                   DFMA R4, R4, R4, R4 ;
        /*0050*/               @P0 BRA `(.L_x_5) ;
.L_x_6:
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
.L_x_2:
	//## File "/x/csrc/cuda/count.cu", line 4 inlined at "/x/csrc/cuda/count.cu", line 10
	//## File "/x/csrc/cuda/count.cu", line 10 inlined at "/x/csrc/cuda/count.cu", line 18
	//## File "/x/csrc/cuda/count.cu", line 18 inlined at "/x/csrc/cuda/count.cu", line 24
	//## File "/x/csrc/cuda/count.cu", line 24
        /*0080*/                   LDS.128 R4, [R2] ;
        /*0090*/               @P0 BRA `(.L_x_2) ;
        /*00a0*/                   EXIT ;
"""


@pytest.fixture
def switch(monkeypatch):
    """A kernel in which one statement has become two loops, one of them with a loop in double precision."""
    for cached in (pixel_passes.function_at, pixel_passes.case_at, pixel_passes.pass_name):
        cached.cache_clear()
    monkeypatch.setattr(pixel_passes, "source", lambda file: SOURCE.splitlines() if file == "cuda/count.cu" else [])
    one = sass.Kernel("count_kernel", "sm_90a", 40, 0, 1024, 0, threads=256)
    sass.parse_listing(SWITCH.splitlines(), {"count": one})
    yield one
    for cached in (pixel_passes.function_at, pixel_passes.case_at, pixel_passes.pass_name):
        cached.cache_clear()


def test_one_statement_may_be_several_loops_named_by_their_cases(switch):
    assert [one.targets for one in switch.instructions if one.opcode == "BRX"] == [[".L_x_1", ".L_x_2"]]
    found = dict(pixel_passes.loops_at(switch, ("cuda/count.cu", 4)))
    assert sorted(found) == ["count_pass amounts", "count_pass angles"]
    assert found["count_pass angles"].header == 1 and found["count_pass amounts"].header == 9


def test_single_pixels_are_counted_where_a_pass_looks_for_exact_keys(switch, monkeypatch):
    said = kernel_counts.Statement(16, False, 1)
    monkeypatch.setattr(kernel_counts, "statements", lambda: {("cuda/count.cu", 4): said})
    found = {loop.work: loop for loop in kernel_counts.pixel_loops([switch])}
    assert found["count_pass angles"].most["fp64"] == 0
    (loop,) = (one for name, one in pixel_passes.loops_at(switch, ("cuda/count.cu", 4)) if name.endswith("angles"))
    exact = kernel_counts.measure(switch, loop, ("cuda/count.cu", 4), "exact_pass", said)
    assert exact.most["fp64"] == 1 and exact.most["all"] == found["count_pass angles"].most["all"] + 2
    switch.name = "count_kernel<float>"
    monkeypatch.setattr(
        kernel_counts, "statements", lambda: {("cuda/count.cu", 4): kernel_counts.Statement(4, False, 1)}
    )
    found = {loop.work: loop for loop in kernel_counts.pixel_loops([switch])}
    assert found["count_pass angles"].most["fp64"] == 4, "of float32 images every pixel is evaluated so"


class Pass:
    """A loop of a made-up kernel that executes so many instructions a pixel."""

    def __init__(self, kernel, work, instructions):
        self.kernel, self.work = sass.Kernel(kernel, "sm_90a", 0, 0, 0, 0), work
        self.found = {"all": instructions, "atomic": 2, "words": 4}

    def per_pixel(self, kind):
        return self.found.get(kind, 0)


WORKS = ["load_pixels", "list_pixels", "rebuild_image image", "coarse_pass angle_coarse",
         "coarse_pass concentration_coarse", "exact_pass 1", "exact_pass 2"]  # fmt: skip


def test_a_team_goes_through_all_keys_where_a_list_was_in_vain():
    passes = [Pass("team_kernel<BlockTeam, false>", work, 128) for work in WORKS]
    missed = kernel_prediction.MISSED
    often = {loop.work: times for loop, times in kernel_prediction.passes_of(passes, 224 * 224, 1)}
    assert often == dict(zip(WORKS, [1, 2, 1, *4 * [missed]], strict=True))
    larger = {loop.work: times for loop, times in kernel_prediction.passes_of(passes, 300 * 300, 1)}
    assert larger == {**often, "exact_pass 1": 2 * missed, "exact_pass 2": 2 * missed}
    assert kernel_prediction.passes_of(passes, 300 * 300, 4) == [] == kernel_prediction.passes_of(passes[1:], 9, 1)


def test_the_streaming_plan_goes_through_all_keys():
    fit = "advance_kernel<unsigned char, false>"
    passes = [Pass("begin_kernel<unsigned char, false>", "sums_of_thread", 1)]
    passes += [Pass("reconstruct_kernel<unsigned char, false>", "rebuild_image image", 1)]
    passes += [Pass(fit, work, 1) for work in WORKS[3:]]
    often = [times for _, times in kernel_prediction.passes_of(passes, 1 << 24, 0)]
    assert often == [1, 1, 1, 1, 2, 2] and kernel_prediction.few_of([], 1 << 24, 0) == []


def test_whole_calls_are_the_sum_of_their_passes():
    team = "team_kernel<BlockTeam, false>"
    passes = [Pass(team, work, 128) for work in WORKS]
    head, (row, _) = kernel_prediction.plans_table(passes, [])
    assert head[0] == "call" and row[:2] == ["normalize 224x224", "resident"]
    gone_through = 4 + 4 * kernel_prediction.MISSED
    seconds = gone_through * 224 * 224 / (H200.gigahertz * 1e9)  # a clock a pixel in each pass
    assert row[2:4] == [f"{1e6 * seconds:,.0f}", f"{H200.multiprocessors / seconds:,.0f}"]
    beside = 1e-6 * kernel_prediction.us_beside(1, 224 * 224)
    assert row[5] == f"{H200.multiprocessors / (seconds / kernel_prediction.ISSUED + beside):,.0f}"
    few = [Pass(team, "evaluate_list, of a listed pixel", 128 * 512), Pass("another", "sample_keys, of one", 9)]
    _, (more, _) = kernel_prediction.plans_table(passes, few)
    slots = 2 * 512 * -(-kernel_prediction.LISTED * 224 * 224 // 512)
    assert more[3] == f"{H200.multiprocessors / (seconds + 512 * slots / (H200.gigahertz * 1e9)):,.0f}"


def test_tables_are_repeated_where_there_is_room():
    assert [kernel_prediction.copies_of(n) for n in (224 * 224, 256 * 256, 70_000, 700 * 460 // 8)] == [32, 16, 4, 32]
    team = Pass("team_kernel<BlockTeam, false>", "list_pixels", 0)
    team.found = {"words": 4, "look-ups": 3}
    words = [32 * kernel_prediction.clocks_a_pixel(team, 3.5, copies)["shared memory"] for copies in (32, 16, 8, 1)]
    assert words == [4, 7, pytest.approx(4 + 3 * 1.9), 4 + 3 * 2.5]
    team.work = "sample_keys, of a sampled pixel"
    assert 32 * kernel_prediction.clocks_a_pixel(team, 3.5, 32)["shared memory"] == 4 + 3 * 2.5


def test_work_on_few_pixels_is_found(kernel, monkeypatch):
    statements = {
        ("cuda/brighten.cu", 12): pixel_passes.FewPixels(1, "sampled", False),
        ("cuda/brighten.cu", 13): pixel_passes.FewPixels(4, "listed", True),
    }
    monkeypatch.setattr(kernel_counts, "few_statements", lambda: statements)
    monkeypatch.setattr(kernel_counts, "function_at", lambda place: f"line_{place[1]}")
    monkeypatch.setattr(kernel_counts, "inlined_from", lambda kernel, function: kernel.instructions[:6])
    sampled, listed = kernel_counts.few_pixels([kernel])
    assert sampled.work == "line_12, of a sampled pixel" and sampled.most["all"] == 13  # by the longest way
    assert listed.work == "line_13, of a listed pixel" and listed.per_pixel("all") == 6 / 4
    assert sampled.most["bytes read"] == 0
    assert kernel_counts.work_on_few([sampled])[-1].startswith("| `brighten_u8` | line_12, of a sampled pixel | 13.0")


def test_statements_on_few_pixels_are_read_from_the_sources():
    found = {(place[0], said.which, said.unrolled) for place, said in pixel_passes.few_statements().items()}
    assert found == {("cuda/tail_list.h", "sampled", False), ("cuda/tail_list.h", "listed", False),
                     ("cuda/tail_list.h", "listed", True)}  # fmt: skip


@pytest.mark.parametrize(
    ("size", "blocks"), [("224x224", 1), ("256x256", 1), ("700x460", 8), ("1024x1024", 16), ("4096x4096", 0)]
)
def test_blocks_that_hold_an_image(size, blocks):
    assert kernel_prediction.blocks_of(kernel_prediction.CALLS[size]) == blocks
