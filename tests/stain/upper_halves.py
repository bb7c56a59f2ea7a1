"""Reads the disassembly of object files for functions that leave the upper halves of vector registers in use.

After such a function returns, SSE code runs many times slower on some processors (Intel, "Optimization Reference
Manual", 15.3). ``vzeroupper`` ends the use. Registers 16 to 31 do not matter: no SSE instruction reaches them.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

_HEADER = re.compile(r"^[0-9a-f]+ <(.+)>:$")
_INSTRUCTION = re.compile(r"^\s+([0-9a-f]+):\t(.+)$")
_RELOCATION = re.compile(r"^\s+[0-9a-f]+: (R_X86_64_\S+)\s+(\S+)")
_WIDE = re.compile(r"%[yz]mm(?:[0-9]|1[0-5])(?:\{[^}]*\})*$")
_PREFIXES = re.compile(r"^(?:(?:notrack|bnd|lock|rep|repz|repnz|data16|cs)\s+)+")


@dataclass
class _Instruction:
    address: int
    text: str
    external: str | None = None  # the symbol of a relocated call or jump

    @property
    def mnemonic(self) -> str:
        return self.text.split(maxsplit=1)[0]

    @property
    def target(self) -> int | None:
        """Where a direct jump or call within the section goes."""
        found = re.match(r"\S+\s+([0-9a-f]+) <", self.text)
        return int(found.group(1), 16) if found and self.external is None else None

    @property
    def is_jump(self) -> bool:
        return self.mnemonic.startswith("j")

    @property
    def ends_block(self) -> bool:
        return self.mnemonic in ("ret", "retq", "jmp", "jmpq", "ud2", "hlt")


@dataclass
class _Function:
    name: str
    body: list[_Instruction] = field(default_factory=list)


def functions_in_use_at_exit(objects: list[Path]) -> tuple[list[str], int]:
    """The exits (``object: function: instruction``) with upper halves in use, and how many functions use any."""
    wrong, wide = [], 0
    for path in objects:
        for function in _functions(path):
            if any(_WIDE.search(instruction.text) for instruction in function.body):
                wide += 1
            wrong += [f"{path.name}: {function.name}: {text}" for text in _exits_in_use(function)]
    return wrong, wide


def _functions(path: Path) -> list[_Function]:
    command = ["objdump", "--disassemble", "--reloc", "--no-show-raw-insn", "--demangle", str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions: list[_Function] = []
    for line in listing.splitlines():
        if header := _HEADER.match(line):
            functions.append(_Function(header.group(1)))
        elif (relocation := _RELOCATION.match(line)) and functions and functions[-1].body:
            last = functions[-1].body[-1]
            if last.is_jump or last.mnemonic.startswith("call"):
                last.external = relocation.group(2)
        elif (instruction := _INSTRUCTION.match(line)) and functions:
            text = _PREFIXES.sub("", instruction.group(2).split("#")[0].strip())
            functions[-1].body.append(_Instruction(int(instruction.group(1), 16), text))
    return functions


def _exits_in_use(function: _Function) -> list[str]:
    """Returns, calls and jumps out of the function that some path reaches with upper halves in use.

    A forward data flow over instructions; `function` is entered with none in use, and its callees leave none.
    """
    body = function.body
    place = {instruction.address: i for i, instruction in enumerate(body)}
    tables = _table_targets(body, place)
    in_use: dict[int, bool] = {}
    waiting = [(0, False)] if body else []
    exits: dict[int, str] = {}
    while waiting:
        i, state = waiting.pop()
        if i >= len(body) or in_use.get(i, False) or (i in in_use and not state):
            continue
        in_use[i] = state
        instruction = body[i]
        indirect = re.match(r"\S+\s+\*", instruction.text) is not None
        inside = bool(tables) if indirect else instruction.target in place
        leaves = instruction.mnemonic.startswith(("ret", "call")) or (instruction.is_jump and not inside)
        if leaves and state:
            exits[i] = instruction.text + (f" ({instruction.external})" if instruction.external else "")
        if instruction.mnemonic in ("vzeroupper", "vzeroall"):
            state = False
        elif _WIDE.search(instruction.text):
            state = True
        if instruction.is_jump:
            targets = tables if indirect else [place[instruction.target]] if instruction.target in place else []
            waiting += [(target, state) for target in targets]
        if not instruction.ends_block:
            waiting.append((i + 1, state))
    return [exits[i] for i in sorted(exits)]


def _table_targets(body: list[_Instruction], place: dict[int, int]) -> list[int]:
    """Where a jump by a table may go, which a listing does not say: wherever no other path leads."""
    direct = {place[i.target] for i in body if i.is_jump and i.target in place}
    targets = []
    for i in range(1, len(body)):
        if body[i - 1].ends_block:
            while i < len(body) and body[i].mnemonic.startswith(("nop", "xchg")):
                i += 1
            if i < len(body) and i not in direct:
                targets.append(i)
    return targets
