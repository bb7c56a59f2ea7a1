"""Runs GPU cases in a process of its own: `gpu_worker.py FOLDER`, a case a line on stdin, an answer a line on stdout.

    {"module": M, "case": N, "ceilings": [GB/s, TFLOP/s]}   ->   {"rows": [...]} or {"error": "...", "sticky": bool}

The first line says that it is ready. After an error of the device itself (`sticky`) every later call of the process
would fail, so the worker ends.
`gpu_worker.py FOLDER MODULE` runs every case of one module once and prints a line for each: what a sanitizer watches.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gpu_case import Ceilings, GpuCase, cases_of
from record import Row


def completed(case: GpuCase, rows: Row | Sequence[Row]) -> list[Row]:
    """The rows, with the case's targets, predictions and title in the one that has its name."""
    given = [rows] if isinstance(rows, Row) else list(rows)
    for row in given:
        if row.name == case.name:
            known = {"title": case.title, "target": list(case.targets)}
            row.extra_info = {**{key: value for key, value in known.items() if value}, **row.extra_info}
    return given


def is_sticky(error: BaseException) -> bool:
    """True if the device, not the call, is broken."""
    text = str(error)
    broken = ("illegal memory access", "misaligned address", "unspecified launch failure", "device-side assert")
    return (
        any(words in text for words in (*broken, "CUDA error", "illegal instruction")) and "out of memory" not in text
    )


def release() -> None:
    """Give the memory of the last case back."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def answer_to(request: dict[str, Any], cases: dict[str, dict[str, GpuCase]], folder: Path) -> dict[str, Any]:
    """Run one case."""
    try:
        module = request["module"]
        if module not in cases:
            cases[module] = {case.name: case for case in cases_of(module, folder)}
        case = cases[module][request["case"]]
        rows = completed(case, case.run(Ceilings(*(math.nan if c is None else c for c in request["ceilings"]))))
        release()
        return {"rows": [asdict(row) for row in rows]}
    except Exception as error:  # one case must not take the others with it
        return {"error": f"{type(error).__name__}: {error}", "sticky": is_sticky(error)}


def serve(folder: Path) -> int:
    """Answer requests until there are no more."""
    # what libraries print goes to stderr, so that stdout has answers alone
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cases: dict[str, dict[str, GpuCase]] = {}
    print(json.dumps({"ready": True}), file=channel, flush=True)
    for line in sys.stdin:
        answer = answer_to(json.loads(line), cases, folder)
        print(json.dumps(answer), file=channel, flush=True)
        if answer.get("sticky"):
            return 3
    return 0


def run_module(folder: Path, module: str) -> int:
    """Run every case of a module once; exit code 1 if one raised."""
    failed = 0
    for case in cases_of(module, folder):
        try:
            case.run(Ceilings(math.nan, math.nan))
            print(f"ok {case.name}", flush=True)
        except Exception as error:
            failed = 1
            print(f"FAIL {case.name}: {type(error).__name__}: {error}", flush=True)
    return failed


if __name__ == "__main__":
    where = Path(sys.argv[1])
    sys.exit(run_module(where, sys.argv[2]) if len(sys.argv) == 3 else serve(where))
