"""Everything that only a GPU can show, in one command: `python3 dev.py gpu`.

In this order, within the time given: a build for the GPU at hand, each kernel against the CPU path, the tests marked
`gpu` and, beside them, the sanitizers, the two ceilings, then every case of bench/bench_*_gpu.py, the most important
first. Each result is on disk as it comes, under bench/results/ and in --out; a step that fails is recorded and does not
stop the others; a short table comes last. Less than four minutes is the smoke level: no tests, no sanitizers, one case
an operator.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gpu_steps
from ceilings_gpu import COPY, MATMUL
from gpu_case import Ceilings, cases_of, modules
from gpu_runner import Deadline, Runner, Task
from gpu_table import final_table
from machine import ROOT, gpu_state
from record import RESULTS, Record, Row, without_figures

SMOKE_MINUTES = 4.0
LAST_SECONDS = 8.0  # kept for the table
MOST_CLOCKS = 40  # that a record keeps


class Check:
    """One run: the device, its record, the time."""

    def __init__(self, device: gpu_steps.GpuDevice, options: argparse.Namespace) -> None:
        self.device, self.out, self.only = device, options.out, options.only or ""
        self.smoke = options.minutes < SMOKE_MINUTES
        self.deadline = Deadline(60 * options.minutes - LAST_SECONDS)
        self.record = Record.of(device.machine, options.results)
        self.logs = options.logs
        self.logs.mkdir(parents=True, exist_ok=True)
        self.runner = Runner(device.folder, self.logs / "cases.log", self.deadline)
        self.ceilings = Ceilings(math.nan, math.nan)
        self.rows: list[Row] = []

    def add(self, rows: Iterable[Row]) -> None:
        """Write rows to disk, with a copy of the record in --out, and say so."""
        for row in rows:
            self.rows.append(row)
            try:
                self.record.add(row)
                if self.out is not None and self.out.resolve() != self.record.path.parent.resolve():
                    self.out.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(self.record.path, self.out / self.record.path.name)
            except (OSError, ValueError) as error:  # a full disk, a record of another tree: the table still tells
                print(f"not written: {error}"[:300], flush=True)
            detail = row.extra_info.get("detail") or f"{row.p50:.4g} {row.unit}"
            print(f"[{row.status}] {row.name}: {detail}"[:200], flush=True)

    def guarded(self, name: str, step: Callable[..., Row | Iterable[Row]], *arguments: object) -> None:
        """Run a step and add its rows; an exception becomes a row."""
        try:
            found = step(*arguments)
            self.add([found] if isinstance(found, Row) else found)
        except Exception as error:  # the other steps must still run
            self.add([gpu_steps.row_of(name, "FAIL", f"{type(error).__name__}: {error}"[:300])])

    def run_cases(self, names: Iterable[str], only: str = "") -> None:
        """Run the cases of these modules, the most important first."""
        tasks: list[Task] = []
        for module in names:
            try:
                tasks += [Task(module, case) for case in cases_of(module, self.device.folder)]
            except Exception as error:
                detail = f"{type(error).__name__}: {error}"[:300]
                self.add([without_figures(module, module, "FAIL", f"it offers no cases: {detail}")])
        for task in sorted(tasks, key=lambda task: task.case.importance):
            if (self.smoke and not task.case.smoke) or only not in f"{task.module} {task.case.name}":
                continue
            self.add(self.runner.run(task, self.ceilings))
            clocks = self.record.machine["clocks"]
            if self.device.machine["kind"] == "gpu" and len(clocks) < MOST_CLOCKS and (state := gpu_state()):
                clocks.append({"after": task.case.name, **state})

    def run(self, binary: Path | None) -> None:
        self.guarded("build", gpu_steps.build, self.device, self.logs, self.deadline.share(0.6, 300))
        self.run_cases(["agreement_gpu"])
        self.guarded("binary", gpu_steps.foreign_binary, binary, self.logs, self.deadline.share(0.2, 60))
        if not self.smoke:
            self.correctness()
        self.run_cases(["ceilings_gpu"])
        found = {row.name: row.p50 for row in self.rows if row.bench == "ceilings_gpu" and row.status == "measured"}
        self.ceilings = Ceilings(found.get(COPY, math.nan), found.get(MATMUL, math.nan))
        self.run_cases(modules(self.device.folder), self.only)
        self.runner.close()

    def correctness(self) -> None:
        """The tests and the sanitizers, at the same time: neither is timed."""
        seconds = self.deadline.share(0.4, 200)
        self.runner.close()
        with ThreadPoolExecutor() as pool:
            tools = gpu_steps.SANITIZERS
            found = [pool.submit(gpu_steps.sanitizer, self.device, tool, self.logs, seconds) for tool in tools]
            self.guarded("tests", gpu_steps.tests, self.device, self.logs, seconds)
            for tool, future in zip(tools, found, strict=True):
                self.guarded(f"compute-sanitizer {tool}", future.result)

    def finish(self) -> int:
        """Print the table, and keep it and the logs; exit code 1 if a step failed."""
        table = final_table(self.record.machine, self.rows)
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "table.txt").write_text(table + "\n")
            logs = {log.name: log.read_text(errors="replace") for log in sorted(self.logs.glob("*.log"))}
            ends = "\n".join(f"== {name} ==\n{text[-200_000:]}" for name, text in logs.items())
            (self.out / "logs.txt").write_text(ends)
        print(f"\nrecord: {self.record.path}\n\n{table}", flush=True)
        return 1 if any(row.status == "FAIL" for row in self.rows) else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dev.py gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="time given (default 9; below 4: smoke level)")
    parser.add_argument("--out", type=Path, help="folder for a copy of the record, the table and the logs")
    parser.add_argument("--results", type=Path, help="folder of the record (default bench/results)")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "gpu", help="folder of the logs")
    parser.add_argument(
        "--binary", type=Path, help="a libernet.so built with another torch, to be loaded under this one"
    )
    parser.add_argument("--commit", help="the commit of this tree, where it came without its git history")
    parser.add_argument("--only", metavar="TEXT", help="of the benches, those with this in their name or module")
    parser.add_argument("--simulate", action="store_true", help="the flow alone, with the kernels run on the CPU")
    # for the tests of the flow
    parser.add_argument("--cases", type=Path, default=gpu_steps.SIMULATED, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.results is None:  # what is simulated is no record of a GPU
        options.results = ROOT / "build" / "simulated" if options.simulate else RESULTS
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes:g}; expected a positive number")
    if options.binary is not None and not options.binary.is_file():
        parser.error(f"--binary {options.binary}: no such file")
    return options


def stop(*_: object) -> None:
    """End at once what is running, so that the table is still printed by a run that is told to end."""
    gpu_steps.stop_all()
    sys.exit(143)


def main(arguments: list[str] | None = None) -> int:
    """Run every step; exit code 1 if one failed."""
    options = parse(arguments)
    if options.commit:
        os.environ["ERNET_COMMIT"] = options.commit
    if options.simulate:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        device = gpu_steps.emulator(options.cases)
    else:
        import torch

        if not torch.cuda.is_available():
            print("dev.py gpu: torch sees no CUDA device here; nothing was built, run or recorded.")
            return 1
        device = gpu_steps.device_at_hand()
    check = Check(device, options)
    signal.signal(signal.SIGTERM, stop)
    try:
        check.run(options.binary)
    finally:
        code = check.finish()
    return code


if __name__ == "__main__":
    sys.exit(main())
