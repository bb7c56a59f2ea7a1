"""The loops over pixels of a kernel, found in its machine code by what the sources say of them.

A loop over pixels says in its source how much it takes, in a comment behind the `for`:

    for (...) {  // 48 bytes of pixels an iteration
    for (...) {  // 16 pixels an iteration, 3 times

Loops over a few pixels of an image say which:

    for (...) {  // 1 sampled pixel an iteration
    for (...) {  // 6 listed pixels unrolled

"3 times" is how often the kernel goes over all pixels in this loop. A function with such a loop is inlined wherever it
is called, so one line of the sources can be several loops of a kernel. Each is named after the function that calls it
and, where that call is a case of a switch, the case.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sass import Instruction, Kernel, Loop, Place

ROOT = Path(__file__).resolve().parent.parent
STATED = re.compile(r"//.*?\b(\d+) (bytes of pixels|pixels) an iteration(?:, (\d+) times)?")
FEW = re.compile(r"//.*?\b(\d+) (sampled|listed) pixels? (an iteration|unrolled)")
CASE = re.compile(r"\bcase (?:\w+::)*(\w+):")
FUNCTION = re.compile(r"[\w:<>&*, ]*?\b(\w+)\((?!.*;\s*$)")
LINES_OF_A_CASE = 8
MOSTLY = 0.8


@dataclass(frozen=True)
class Statement:
    """What the source says of a loop over pixels."""

    amount: int
    in_bytes: bool
    times: int


def statements() -> dict[Place, Statement]:
    """The loops over pixels of csrc/cuda and csrc/macenko, by file below csrc and line."""
    found = {}
    for folder in ("cuda", "macenko"):
        for path in sorted((ROOT / "csrc" / folder).glob("*.*")):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if match := STATED.search(line):
                    said = Statement(int(match[1]), match[2].startswith("bytes"), int(match[3] or 1))
                    found[(f"{folder}/{path.name}", number)] = said
    return found


@dataclass(frozen=True)
class FewPixels:
    """What the source says of a loop over some of an image's pixels."""

    amount: int
    which: str
    unrolled: bool


def few_statements() -> dict[Place, FewPixels]:
    """The loops over sampled and over listed pixels, by file below csrc and line."""
    found = {}
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.*")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if match := FEW.search(line):
                found[(f"cuda/{path.name}", number)] = FewPixels(int(match[1]), match[2], match[3] == "unrolled")
    return found


@cache
def below_csrc(place: Place) -> Place:
    """A place as `statements` names it."""
    return place[0].rpartition("/csrc/")[2], place[1]


@cache
def source(file: str) -> list[str]:
    """The lines of a file below csrc; none if there is no such file."""
    path = ROOT / "csrc" / file
    return path.read_text().splitlines() if path.is_file() else []


@cache
def function_at(place: Place) -> str:
    """The function that a line is in, "" for a kernel."""
    for line in reversed(source(place[0])[: place[1]]):
        if line[:1] not in ("", " ", "}", "#", "/"):
            found = FUNCTION.match(line)
            return found[1] if found and "__global__" not in line else ""
    return ""


@cache
def case_at(place: Place) -> str:
    """The case of a switch that a line stands in, "" where it is in none."""
    lines = source(place[0])[: place[1]]
    for number, line in enumerate(reversed(lines[-LINES_OF_A_CASE:])):
        if found := CASE.search(line):
            return found[1]
        if number and re.search(r"\b(return|break)\b", line):
            break
    return ""


@cache
def pass_name(chain: tuple[Place, ...]) -> str:
    """What a loop does: the function that calls the one with the loop, and the first case on the way outwards."""
    if len(chain) == 1:
        return ""
    case = next(filter(None, map(case_at, chain[1:])), "")
    return f"{function_at(chain[1])} {case}".strip()


def own_blocks(kernel: Kernel, loop: Loop) -> frozenset[int]:
    """The blocks of a loop that are in no inner loop."""
    inner = [other.blocks for other in kernel.loops if other.blocks < loop.blocks]
    return loop.blocks - frozenset().union(*inner)


def inner_loops(kernel: Kernel, loop: Loop) -> list[Loop]:
    """The loops directly inside a loop."""
    inside = [other for other in kernel.loops if other.blocks < loop.blocks]
    return [one for one in inside if not any(one.blocks < other.blocks for other in inside)]


def callers_of(kernel: Kernel, place: Place) -> set[tuple[Place, ...]]:
    """The ways by which a statement came into a kernel: the lines of the calls that were inlined, outwards."""
    found = set()
    for block in kernel.reachable:
        for one in kernel.of_block(block):
            places = tuple(map(below_csrc, one.places))
            if place in places:
                found.add(places[places.index(place) + 1 :])
    return found


def loops_at(kernel: Kernel, place: Place) -> Iterator[tuple[str, Loop]]:
    """The loops that a statement has become, by name.

    One that came by way of other functions is the largest loop that did, but for a few instructions that the compiler
    moved there; else it is the innermost one with instructions of the statement's line. Where the compiler gives the
    lines of one loop to several, they are numbered in the order of the machine code.
    """
    for callers in sorted(callers_of(kernel, place)):
        if not callers or not function_at(callers[0]):
            own = [loop for loop in kernel.loops if _has(kernel, loop, place)][-1:]
        else:
            own = [loop for loop in kernel.loops if _share_by(kernel, loop, callers) >= MOSTLY]
            own = [loop for loop in own if not any(loop.blocks < other.blocks for other in own)]
            own.sort(key=lambda loop: loop.header)
        for number, loop in enumerate(own, 1):
            chain = (place, *callers)
            yield pass_name(chain) if len(own) == 1 else f"{function_at(callers[0])} {number}", loop


def innermost_at(kernel: Kernel, place: Place) -> Loop | None:
    """The smallest loop with instructions of a line that are in no inner loop."""
    return next((loop for loop in reversed(kernel.loops) if _has(kernel, loop, place)), None)


def inlined_from(kernel: Kernel, function: str) -> list[Instruction]:
    """All instructions that a function, or what it calls, has become."""
    return [one for one in kernel.instructions if function in {function_at(below_csrc(place)) for place in one.places}]


def _share_by(kernel: Kernel, loop: Loop, callers: tuple[Place, ...]) -> float:
    """Of the instructions of a loop, the share that was inlined by these calls."""
    instructions = [one for block in loop.blocks for one in kernel.of_block(block)]
    mine = sum(tuple(map(below_csrc, one.places))[-len(callers) :] == callers for one in instructions)
    return mine / len(instructions)


def _has(kernel: Kernel, loop: Loop, place: Place) -> bool:
    return any(
        place in map(below_csrc, one.places) for block in own_blocks(kernel, loop) for one in kernel.of_block(block)
    )
