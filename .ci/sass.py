"""Compiled CUDA kernels read back: resources, instructions with the source lines they come from, and loops.

Uses cuobjdump and nvdisasm: those beside nvcc, else those that triton carries. Standard library only.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path

USAGE = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
SECTION = re.compile(r"\s*\.section\s+\.text\.(\S+?),")
LABEL = re.compile(r"(\.L_\S+):")
PLACE = re.compile(r'(?:File |inlined at )"([^"]*)", line (\d+)')
INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+\{?\s*(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*)")
THREADS = re.compile(r"\.nv\.info\.(\S+?)\s|EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+0x(\w+) 0x(\w+) 0x(\w+)")

Place = tuple[str, int]


@dataclass(frozen=True)
class Instruction:
    """One machine instruction; `places` are the source lines that it comes from, the innermost first."""

    predicate: str
    opcode: str
    operands: str
    places: tuple[Place, ...]

    @property
    def targets(self) -> list[str]:
        """The labels that a branch goes to; of a switch all of them."""
        if self.opcode.startswith(("BRX", "JMX")):
            found = re.search(r'BRANCH_TARGETS ([^"]*)"', self.operands)
            return found.group(1).split(",") if found else []
        found = re.search(r"`\((\.L_\S+?)\)", self.operands)
        return [found.group(1)] if found and self.opcode.startswith(("BRA", "JMP")) else []

    @property
    def conditional(self) -> bool:
        """True if threads may pass it by: a predicate before it, or among the operands of a branch."""
        return bool(self.predicate) or bool(re.match(r"!?U?P\d", self.operands))


@dataclass(frozen=True)
class Loop:
    """A natural loop: its blocks by their first instruction's number, and the block it is entered by."""

    header: int
    blocks: frozenset[int]


@dataclass
class Kernel:
    """One kernel for one architecture."""

    name: str
    arch: str
    registers: int
    stack: int
    shared: int
    local: int
    threads: int = 0
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @cached_property
    def blocks(self) -> dict[int, tuple[int, list[int]]]:
        """Basic blocks by their first instruction: the number behind the last one, and the blocks that may follow."""
        count = len(self.instructions)
        starts = {0, count} | {place for place in self.labels.values() if place < count}
        starts |= {i + 1 for i, one in enumerate(self.instructions) if one.targets or _ends(one)}
        ordered = sorted(starts)
        found = {}
        for begin, end in pairwise(ordered):
            last = self.instructions[end - 1]
            follow = [self.labels[label] for label in last.targets if label in self.labels]
            if end < count and (last.conditional or not (last.targets or _ends(last))):
                follow.append(end)
            found[begin] = (end, follow)
        return found

    @cached_property
    def loops(self) -> list[Loop]:
        """Natural loops, the outer ones first."""
        before: dict[int, set[int]] = {}
        for block, (_, follow) in self.blocks.items():
            for other in follow:
                before.setdefault(other, set()).add(block)
        found: dict[int, set[int]] = {}
        above = _dominators(self.blocks, before)
        for block, dominators in above.items():
            for header in self.blocks[block][1]:
                if header in dominators:
                    body = found.setdefault(header, {header})
                    waiting = [block]
                    while waiting:
                        one = waiting.pop()
                        if one not in body:
                            body.add(one)
                            waiting += [b for b in before.get(one, ()) if b in above]
        return sorted((Loop(h, frozenset(b)) for h, b in found.items()), key=lambda loop: -len(loop.blocks))

    @cached_property
    def reachable(self) -> set[int]:
        """The blocks that some way from the start leads to."""
        found: set[int] = set()
        waiting = [0] if self.blocks else []
        while waiting:
            block = waiting.pop()
            if block not in found:
                found.add(block)
                waiting += self.blocks[block][1]
        return found

    def of_block(self, block: int) -> list[Instruction]:
        """The instructions of a block."""
        return self.instructions[block : self.blocks[block][0]]

    def way_through(
        self, loop: Loop, allowed: Callable[[int], bool], worth: Callable[[int], tuple[float, ...]] | None = None
    ) -> list[int]:
        """The blocks of one iteration on the way through `allowed` blocks that is worth most.

        `worth` gives numbers of a block, to be added up and compared in their order; without it the way with the most
        instructions counts. Inner loops are gone through once. Empty if no way is allowed.
        """

        def length(block: int) -> tuple[float, ...]:
            return (self.blocks[block][0] - block,)

        value = worth or length

        @cache
        def best(block: int) -> tuple[tuple[float, ...], tuple[int, ...]] | None:
            if not allowed(block):
                return None
            follow = self.blocks[block][1]
            mine = value(block)
            ways = [((0.0,) * len(mine), ())] if loop.header in follow else []
            ways += [best(b) for b in follow if b in loop.blocks and b > block and b != loop.header]
            found = [way for way in ways if way is not None]
            if not found:
                return None
            most, blocks = max(found)
            return tuple(a + b for a, b in zip(mine, most, strict=True)), (block, *blocks)

        way = best(loop.header)
        return [] if way is None else list(way[1])


def _ends(one: Instruction) -> bool:
    return one.opcode.split(".")[0] in ("EXIT", "RET", "BRX", "JMX", "KILL")


def _dominators(blocks: dict[int, tuple[int, list[int]]], before: dict[int, set[int]]) -> dict[int, set[int]]:
    """The blocks that every way from the start to a block goes through, of every block that can be reached."""
    reached, waiting = set(), [0] if blocks else []
    while waiting:
        block = waiting.pop()
        if block not in reached:
            reached.add(block)
            waiting += blocks[block][1]
    found = {block: set(reached) for block in reached}
    if reached:
        found[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            new = {block} | set.intersection(*(found[b] for b in before[block] if b in reached))
            if new != found[block]:
                found[block], changed = new, True
    return found


@cache
def tool(name: str) -> Path:
    """Where cuobjdump or nvdisasm is."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    beside = [Path(home) / "bin" / name] if home else []
    on_path = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    carried = [Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name] if spec and spec.origin else []
    for path in [*beside, *([Path(on_path)] if on_path else []), *carried]:
        if path.exists():
            return path
    raise SystemExit(f"{name} is missing; install the CUDA toolkit's, or the triton of requirements-dev.txt.")


def output(*command: str | Path, folder: Path | None = None) -> str:
    """What a tool prints."""
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def demangled(names: Iterable[str]) -> dict[str, str]:
    """Readable kernel names, with template arguments and without the others."""
    listed = sorted(set(names))
    if not listed:
        return {}
    done = subprocess.run(["c++filt"], input="\n".join(listed), capture_output=True, text=True, check=True)
    shown = (re.sub(r"\(anonymous namespace\)::|^void |ernet::cuda::", "", line) for line in done.stdout.splitlines())
    return {name: text.split("(")[0] for name, text in zip(listed, shown, strict=True)}


def read_kernels(objects: Iterable[Path], detailed: str | None = None) -> list[Kernel]:
    """The kernels in `objects` for every architecture; instructions for the architecture `detailed` alone."""
    kernels = []
    for path in objects:
        usage = output(tool("cuobjdump"), "-res-usage", path)
        for section in re.split(r"(?=arch = sm_)", usage):
            arch = re.match(r"arch = (sm_\w+)", section)
            for name, *numbers in USAGE.findall(section):
                kernels.append(Kernel(name, arch.group(1) if arch else "?", *map(int, numbers)))
        _read_cubins(path, [kernel for kernel in kernels if kernel.threads == 0], detailed)
    readable = demangled(kernel.name for kernel in kernels)
    for kernel in kernels:
        kernel.name = readable[kernel.name]
    return kernels


def _read_cubins(path: Path, kernels: list[Kernel], detailed: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        output(tool("cuobjdump"), "-xelf", "all", path.resolve(), folder=Path(folder))
        for cubin in sorted(Path(folder).glob("*.cubin")):
            arch = cubin.stem.split(".")[-1]
            mine = {kernel.name: kernel for kernel in kernels if kernel.arch == arch}
            for name, threads in _threads(output(tool("cuobjdump"), "-elf", cubin)):
                if name in mine:
                    mine[name].threads = threads
            if arch == detailed:
                parse_listing(output(tool("nvdisasm"), "-c", "-gi", cubin).splitlines(), mine)


def _threads(elf: str) -> Iterator[tuple[str, int]]:
    """Largest number of threads of a block, of each kernel that states one."""
    name = ""
    for found in THREADS.finditer(elf):
        if found.group(1):
            name = found.group(1)
        else:
            x, y, z = (int(value, 16) for value in found.groups()[1:])
            yield name, x * y * z


def parse_listing(lines: Iterable[str], kernels: dict[str, Kernel]) -> None:
    """Fill in instructions and labels from a listing of nvdisasm with line information."""
    kernel: Kernel | None = None
    places: list[Place] = []
    fresh = False
    for line in lines:
        if found := SECTION.match(line):
            kernel, places = kernels.get(found.group(1)), []
        elif kernel is None:
            continue
        elif "//##" in line:
            if not fresh:
                places, fresh = [], True
            places += [(path, int(number)) for path, number in PLACE.findall(line)]
        elif found := LABEL.match(line):
            kernel.labels[found.group(1)] = len(kernel.instructions)
        elif found := INSTRUCTION.match(line):
            _, predicate, opcode, operands = found.groups()
            chain = tuple(dict.fromkeys(places))
            kernel.instructions.append(Instruction(predicate or "", opcode, operands.strip(), chain))
            fresh = False
