"""Runs GPU cases in a process of its own, which `gpu_runner.py` gives them to, one after the other.

After an error of the device itself every later call of the process would fail, so the worker ends.
`gpu_worker.py FOLDER MODULE` runs every case of one module once and prints a line for each: what a sanitizer watches.
"""

from __future__ import annotations

import math
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gpu_case import Ceilings, GpuCase, cases_of
from machine import ROOT
from record import Row


class Answer(NamedTuple):
    """The rows of a case, or why there are none."""

    rows: list[Row]
    error: str = ""
    sticky: bool = False
    """True if the device, not the call, is broken."""


def answer_to(case: GpuCase, ceilings: Ceilings) -> Answer:
    """Run one case; its targets and title go into the row that has its name."""
    try:
        rows = case.run(ceilings)
        found = [rows] if isinstance(rows, Row) else list(rows)
        for row in found:
            if row.name == case.name:
                row.extra_info = {**case.known, **row.extra_info}
        if torch.cuda.is_available():  # give the memory back
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return Answer(found)
    except Exception as error:  # one case must not take the others with it
        text = f"{type(error).__name__}: {error}"
        return Answer([], text, is_sticky(text))


def is_sticky(text: str) -> bool:
    """True if an error says that the device is broken."""
    broken = ("illegal memory access", "misaligned address", "unspecified launch failure", "device-side assert")
    said = any(words in text for words in (*broken, "CUDA error", "illegal instruction"))
    return said and "out of memory" not in text


def serve(pipe: Connection, folder: Path, log: Path) -> None:
    """Say that this is ready, then answer requests until there are no more; what is printed goes to the log."""
    os.chdir(ROOT)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    modules: dict[str, dict[str, GpuCase]] = {}
    pipe.send(True)
    while True:
        module, name, ceilings = pipe.recv()  # EOFError, once nobody asks any more
        if module not in modules:
            modules[module] = {case.name: case for case in cases_of(module, folder)}
        answer = answer_to(modules[module][name], ceilings)
        pipe.send(answer)
        if answer.sticky:
            return


def run_module(folder: Path, module: str) -> int:
    """Run every case of a module once, without cuDNN if $ERNET_WITHOUT_CUDNN is 1; exit code 1 if one raised."""
    torch.backends.cudnn.enabled = os.environ.get("ERNET_WITHOUT_CUDNN") != "1"
    failed = 0
    for case in cases_of(module, folder):
        answer = answer_to(case, Ceilings(math.nan, math.nan))
        print(f"FAIL {case.name}: {answer.error}" if answer.error else f"ok {case.name}", flush=True)
        failed |= bool(answer.error)
    return failed


if __name__ == "__main__":
    sys.exit(run_module(Path(sys.argv[1]), sys.argv[2]))
