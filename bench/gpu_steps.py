"""The steps of `python3 dev.py gpu` that run another program: build, tests, sanitizers, a binary built elsewhere.

They run on the device at hand, or on the emulator of the tests in its place.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_runner import last_lines
from machine import ROOT, describe
from record import Row, without_figures

MARKED = re.compile(r"^(pytestmark = .*|@)pytest\.mark\.gpu", re.M)
SIMULATED = ROOT / "bench" / "simulated"
WORKER = Path(__file__).with_name("gpu_worker.py")
TIMED_OUT = 124
SANITIZERS = ("memcheck", "racecheck", "initcheck")
_RUNNING: set[subprocess.Popen[bytes]] = set()


@dataclass(frozen=True)
class GpuDevice:
    """The device, the folder of its cases, and how to build for it and test on it."""

    machine: dict[str, Any]
    folder: Path
    build: list[str]
    tests: list[str]
    sanitizer: str | None = None
    build_environment: dict[str, str] = field(default_factory=dict)


def marked_tests(folder: Path = ROOT / "tests") -> list[str]:
    """The files with tests marked `gpu`: the others may import what is not installed beside the device's torch."""
    return sorted(str(path) for path in folder.rglob("test_*.py") if MARKED.search(path.read_text()))


def device_at_hand() -> GpuDevice:
    """The CUDA device that torch sees first."""
    known = shutil.which("compute-sanitizer")
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return GpuDevice(
        machine=describe("gpu"),
        folder=ROOT / "bench",
        build=[sys.executable, "setup.py", "build_ext", "--inplace"],
        tests=["-m", "gpu", *marked_tests()],
        sanitizer=known or (str(beside) if beside.exists() else None),
        build_environment={"ERNET_CUDA": "1"},
    )


def emulator(folder: Path) -> GpuDevice:
    """The kernels run on the CPU: shows that the flow works, and says nothing about any GPU."""
    return GpuDevice(
        machine=describe("gpu-simulated") | {"name": "simulated-gpu"},
        folder=folder,
        build=[sys.executable, str(SIMULATED / "emulated.py"), str(ROOT / "build" / "simt")],
        tests=["tests/simt/test_emulator.py", "-k", "not sanitizers"],  # which are for a machine's own tests
    )


def call(command: list[str], log: Path, seconds: float, grace: float = 0.0, **environment: str) -> int:
    """Run a command with its output in `log`; returns the exit code, TIMED_OUT when it had to be stopped.

    With `grace` it is first interrupted, and has so many seconds to write down what it knows.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        _RUNNING.add(process)
        try:
            return process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            if grace:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=grace)
            _kill(process)
            process.wait()
            return TIMED_OUT
        finally:
            _RUNNING.discard(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a command and what it started: a sanitizer's program and a build's compilers outlive it otherwise."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def stop_all() -> None:
    """End every command that runs at this moment, in whichever thread."""
    for process in list(_RUNNING):
        _kill(process)


def row_of(name: str, status: str, detail: str) -> Row:
    return without_figures("gpu_steps", name, status, detail)


def why(code: int, log: Path, seconds: float) -> str:
    start = f"stopped after {seconds:.0f} s" if code == TIMED_OUT else f"exit code {code}"
    return f"{start}: {last_lines(log)}"


def build(device: GpuDevice, logs: Path, seconds: float) -> Row:
    log, start = logs / "build.log", time.perf_counter()
    code = call(device.build, log, seconds, **device.build_environment)
    if code:
        return row_of("build", "FAIL", why(code, log, seconds))
    return row_of("build", "pass", f"{time.perf_counter() - start:.0f} s")


def tests(device: GpuDevice, logs: Path, seconds: float) -> Iterator[Row]:
    """Run the tests that need the device; one row for each test function."""
    if importlib.util.find_spec("pytest") is None:
        yield without_figures("tests", "all", "skipped", "pytest is not installed for this interpreter")
        return
    log, report = logs / "tests.log", logs / "tests.xml"
    report.unlink(missing_ok=True)
    options = ["-o", "addopts=--import-mode=importlib", "-q", "-ra", f"--junitxml={report}", "-p", "no:cacheprovider"]
    environment = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    code = call([sys.executable, "-m", "pytest", *options, *device.tests], log, seconds, 15.0, **environment)
    if code == TIMED_OUT:
        yield without_figures("tests", "all", "no time left", f"stopped after {seconds:.0f} s; what ran is listed")
    groups = outcomes_of(report)
    if not groups and code != TIMED_OUT:
        yield without_figures("tests", "all", "FAIL", f"no test ran: {last_lines(log)}")
    for name, outcomes in sorted(groups.items()):
        counts = Counter(kind for kind, _ in outcomes)
        verdict = "FAIL" if counts["failure"] + counts["error"] else "pass" if counts["passed"] else "skipped"
        detail = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items(), key=lambda item: item[0] != "passed"))
        messages = [message for kind, message in outcomes if kind != "passed" and message]
        yield without_figures("tests", name, verdict, f"{detail}: {messages[0]}" if messages else detail)


def outcomes_of(report: Path) -> dict[str, list[tuple[str, str]]]:
    """The outcome of every test function's cases, and the message of each that did not pass, from pytest's report."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        found = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = ("passed", "") if found is None else (found.tag, " ".join(found.get("message", "").split())[:200])
        groups.setdefault(f"{case.get('classname')}.{case.get('name', '').partition('[')[0]}", []).append(outcome)
    return groups


def sanitizer(device: GpuDevice, tool: str, logs: Path, seconds: float) -> Row:
    """Run every kernel once, on small inputs, under one tool of compute-sanitizer."""
    name = f"compute-sanitizer {tool}"
    if device.sanitizer is None:
        return row_of(name, "skipped", "compute-sanitizer is not installed here")
    log = logs / f"{tool}.log"
    # without PyTorch's cache each tensor is an allocation of its own, and a read beyond one is seen
    code = call(
        [device.sanitizer, "--tool", tool, "--error-exitcode", "9",
         sys.executable, "-u", str(WORKER), str(device.folder), "agreement_gpu"],
        log, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )  # fmt: skip
    status, detail = sanitizer_verdict(code, log.read_text(errors="replace"))
    return row_of(name, status, detail or why(code, log, seconds))


def sanitizer_verdict(code: int, text: str) -> tuple[str, str]:
    """Status and detail from the exit code and the output of compute-sanitizer."""
    refused = re.search(r"(?i)device not supported|unable to find injection|failed to initialize", text)
    kernels = len(re.findall(r"(?m)^ok ", text))
    if refused:
        return "skipped", f"it does not work on this machine: {refused[0]}"
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    if code == 0 and (summary is None or summary[1] == "0"):
        return "pass", f"{kernels} kernels, nothing found"
    if summary is not None and summary[1] != "0":
        first = next((line.strip("= ") for line in text.splitlines() if re.search(r"Invalid|Race|Uninit", line)), "")
        return "FAIL", f"{summary[1]} errors, first: {first}"
    if code == TIMED_OUT:
        return "no time left", f"{kernels} kernels before it was stopped, nothing found in them"
    return "FAIL", ""


FOREIGN = """
import ctypes, os, sys, torch
ctypes.CDLL(sys.argv[1], mode=os.RTLD_LAZY | os.RTLD_LOCAL)
x = torch.randn(2, 3, 5, 7)
mean, var = torch.ops.ernet.channel_moments(x, False)
torch.testing.assert_close(mean, x.mean((0, 2, 3)))
torch.testing.assert_close(var, x.var((0, 2, 3), correction=0))
if torch.cuda.is_available():
    image = torch.randint(0, 255, (2, 3, 61, 67), dtype=torch.uint8)
    cpu = torch.ops.ernet.macenko_fit(image, 240.0, 1.0, 0.15, False)
    gpu = torch.ops.ernet.macenko_fit(image.cuda(), 240.0, 1.0, 0.15, False)
    for found, expected in zip(gpu, cpu):
        torch.testing.assert_close(found.cpu(), expected)
print("loaded and correct under torch", torch.__version__)
"""


def foreign_binary(binary: Path | None, logs: Path, seconds: float) -> Row:
    """Load a binary that was built with another torch's headers, and run an operator of each device."""
    name = "binary built elsewhere"
    if binary is None:
        return row_of(name, "skipped", "none given (--binary FILE, a libernet.so)")
    log = logs / "binary.log"
    code = call([sys.executable, "-c", FOREIGN, str(binary.resolve())], log, seconds)
    return row_of(name, "FAIL", why(code, log, seconds)) if code else row_of(name, "pass", last_lines(log, 1))
