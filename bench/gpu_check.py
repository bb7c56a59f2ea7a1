"""Everything that only a GPU can show, in one command: `python3 dev.py gpu`.

What is needed first comes first: a build for the GPU at hand; each kernel against the CPU path, in a process of its own
that is stopped after 25 s; the two ceilings; the headline rows; the tests marked `gpu`, those of the stains and then
those of ER networks; the sanitizers; then every other case of bench/bench_*_gpu.py, the most important first. No step
takes more than its share of the time. Each result is on disk as it comes, under bench/results/ and in --out, logs too;
a step that fails is recorded and does not stop the others; a short table comes last. Less than four minutes is the
smoke level: no tests, no sanitizers, one case an operator.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gpu_steps
from ceilings_gpu import COPY, MATMUL
from gpu_case import Ceilings, GpuCase, cases_of, modules
from gpu_runner import Deadline, Runner, Task
from gpu_table import final_table
from machine import ROOT, gpu_state
from record import RESULTS, Record, Row, without_figures

SMOKE_MINUTES = 4.0
MINUTES = 8.0
LAST_SECONDS = 8.0  # kept for the table
MOST_CLOCKS = 40  # that a record keeps
# The steps in order, and the seconds that each has at most; what is left is for the rest.
STEPS = {
    "build": 110.0, "agreement": 70.0, "ceilings": 15.0, "headline": 105.0, "stain-tests": 40.0, "er-tests": 60.0,
    "sanitizers": 50.0, "rest": math.inf,
}  # fmt: skip
MEASURING = {"headline", "rest"}  # which need the ceilings
NOT_FOR_SMOKE = {"stain-tests", "er-tests", "sanitizers"}


class Check:
    """One run: the device, its record, the time."""

    def __init__(
        self, device: gpu_steps.GpuDevice, options: argparse.Namespace, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.device, self.out, self.only = device, options.out, options.only or ""
        self.smoke = options.minutes < SMOKE_MINUTES
        self.deadline = Deadline(60 * options.minutes - LAST_SECONDS, clock)
        self.steps = options.steps | ({"ceilings"} if options.steps & MEASURING else set())
        self.record = Record.of(device.machine, options.results)
        self.logs = options.logs
        self.logs.mkdir(parents=True, exist_ok=True)
        self.runner = Runner(device.folder, self.logs / "cases.log", self.deadline)
        self.ceilings = Ceilings(math.nan, math.nan)
        self.rows: list[Row] = []
        self.step = ""
        self.again: dict[str, None] = {}  # steps in which something failed or had no time

    def add(self, rows: Iterable[Row]) -> None:
        """Write rows to disk, with a copy of the record in --out, and say so."""
        for row in rows:
            self.rows.append(row)
            if row.status in ("FAIL", "no time left"):
                self.again[self.step] = None
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

    def run_cases(
        self, names: Iterable[str], chosen: Callable[[GpuCase, str], bool] | None = None, alone: bool = False
    ) -> None:
        """Run the cases of these modules that are chosen, by case and module, the most important first."""
        tasks: list[Task] = []
        for module in names:
            try:
                tasks += [Task(module, case) for case in cases_of(module, self.device.folder)]
            except Exception as error:
                detail = f"{type(error).__name__}: {error}"[:300]
                self.add([without_figures(module, module, "FAIL", f"it offers no cases: {detail}")])
        for task in sorted(tasks, key=lambda task: task.case.importance):
            if (self.smoke and not task.case.smoke) or not (chosen is None or chosen(task.case, task.module)):
                continue
            self.add(self.runner.run(task, self.ceilings, alone))
            clocks = self.record.machine["clocks"]
            if self.device.machine["kind"] == "gpu" and len(clocks) < MOST_CLOCKS and (state := gpu_state()):
                clocks.append({"after": task.case.name, **state})
        self.runner.close()

    def run(self, binary: Path | None) -> None:
        """Every step that is asked for, each within its share of the time."""
        for name, seconds in STEPS.items():
            if name not in self.steps or (self.smoke and name in NOT_FOR_SMOKE):
                continue
            print(f"-- {name}, {self.deadline.left():.0f} s left", flush=True)
            self.step = name
            step = self.runner.deadline = self.deadline.part(seconds)
            if name == "build":
                self.guarded("build", gpu_steps.build, self.device, self.logs, step.left())
            elif name == "agreement":
                self.run_cases(["agreement_gpu"], alone=True)
                self.guarded("binary", gpu_steps.foreign_binary, binary, self.logs, step.left())
            elif name == "ceilings":
                self.measure_ceilings()
            elif name == "headline":
                self.run_cases(modules(self.device.folder), self.is_headline)
            elif name == "sanitizers":
                self.sanitizers(step.left())
            elif name == "rest":
                self.run_cases(modules(self.device.folder), self.is_left)
            else:
                group = name.removesuffix("-tests")
                self.guarded(name, gpu_steps.tests, self.device, group, self.logs, step)

    def is_headline(self, case: GpuCase, module: str) -> bool:
        return case.headline and self.only in f"{module} {case.name}"

    def is_left(self, case: GpuCase, module: str) -> bool:
        """Not done yet, and of those asked for."""
        done = {row.key for row in self.rows if row.status != "no time left"}
        return (module, case.name) not in done and self.only in f"{module} {case.name}"

    def measure_ceilings(self) -> None:
        self.run_cases(["ceilings_gpu"])
        found = {row.name: row.p50 for row in self.rows if row.bench == "ceilings_gpu" and row.status == "measured"}
        self.ceilings = Ceilings(found.get(COPY, math.nan), found.get(MATMUL, math.nan))

    def sanitizers(self, seconds: float) -> None:
        """All tools at the same time: nothing is timed."""
        with ThreadPoolExecutor() as pool:
            tools = gpu_steps.SANITIZERS
            found = [pool.submit(gpu_steps.sanitizer, self.device, tool, self.logs, seconds) for tool in tools]
            for tool, future in zip(tools, found, strict=True):
                self.guarded(f"compute-sanitizer {tool}", future.result)

    def finish(self) -> int:
        """Print the table, and keep it; exit code 1 if a step failed."""
        self.runner.close()
        table = final_table(self.record.machine, self.rows)
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "table.txt").write_text(table + "\n")
        print(f"\nrecord: {self.record.path}\nlogs: {self.logs}\n\n{table}", flush=True)
        if self.again:
            print(f"\nwhat failed or had no time, again: python3 dev.py gpu --steps {','.join(self.again)}", flush=True)
        return 1 if any(row.status == "FAIL" for row in self.rows) else 0


def steps_of(text: str) -> set[str]:
    """From names separated by commas."""
    names = {name.strip() for name in text.split(",")}
    if unknown := names - {*STEPS}:
        raise argparse.ArgumentTypeError(f"no step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    return names


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dev.py gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"time given (default {MINUTES:g}; below 4: smoke level)"
    )
    parser.add_argument("--steps", type=steps_of, default={*STEPS}, metavar="A,B", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--out", type=Path, help="folder for a copy of the record, the table and the logs")
    parser.add_argument("--results", type=Path, help="folder of the record (default bench/results)")
    parser.add_argument("--logs", type=Path, help="folder of the logs (default: logs in --out, else build/gpu)")
    parser.add_argument(
        "--binary", type=Path, help="a libernet.so built with another torch, to be loaded under this one"
    )
    parser.add_argument("--wheels", type=Path, help="folder of wheels of other packages, to be measured without pip")
    parser.add_argument("--crops", type=Path, help="images to measure on, from bench/crops.py")
    parser.add_argument("--commit", help="the commit of this tree, where it came without its git history")
    parser.add_argument("--only", metavar="TEXT", help="of the benches, those with this in their name or module")
    parser.add_argument("--simulate", action="store_true", help="the flow alone, with the kernels run on the CPU")
    # for the tests of the flow
    parser.add_argument("--cases", type=Path, default=gpu_steps.SIMULATED, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.results is None:  # what is simulated is no record of a GPU
        options.results = ROOT / "build" / "simulated" if options.simulate else RESULTS
    if options.logs is None:
        options.logs = options.out / "logs" if options.out else ROOT / "build" / "gpu"
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes:g}; expected a positive number")
    for name in ("binary", "crops"):
        if (given := getattr(options, name)) is not None and not given.is_file():
            parser.error(f"--{name} {given}: no such file")
    if options.wheels is not None:
        try:
            options.wheels = importable_wheels(options.wheels)
        except ValueError as error:
            parser.error(f"--wheels {error}")
    return options


def importable_wheels(folder: Path) -> list[str]:
    """The wheels of a folder, which Python imports from as they are: those without compiled code."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise ValueError(f"{folder}: no *.whl in it")
    if compiled := [wheel.name for wheel in wheels if not wheel.name.endswith("-any.whl")]:
        raise ValueError(f"{folder}: {compiled[0]} holds compiled code, which has to be installed; expected *-any.whl")
    return [str(wheel.resolve()) for wheel in wheels]


def stop(*_: object) -> None:
    """End at once what is running, so that the table is still printed by a run that is told to end."""
    gpu_steps.stop_all()
    sys.exit(143)


def main(arguments: list[str] | None = None) -> int:
    """Run every step; exit code 1 if one failed."""
    options = parse(arguments)
    if options.commit:
        os.environ["ERNET_COMMIT"] = options.commit
    if options.crops:
        os.environ["ERNET_CROPS"] = str(options.crops.resolve())
    if options.wheels:  # for this process and all that it starts
        sys.path += options.wheels
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *options.wheels]))
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
