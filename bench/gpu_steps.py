"""The steps of `python3 dev.py gpu` that run another program: build, tests, sanitizers, a binary built elsewhere.

They run on the device at hand, or on the emulator of the tests in its place.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_runner import Deadline, last_lines
from machine import ROOT, cores, describe
from record import Row, without_figures

MARKED = re.compile(r"^(pytestmark = .*|@)pytest\.mark\.gpu", re.M)
SIMULATED = ROOT / "bench" / "simulated"
WORKER = Path(__file__).with_name("gpu_worker.py")
TIMED_OUT = 124
SANITIZERS = ("memcheck", "racecheck", "initcheck")
TEST_GROUPS = ("stain", "er")
STAIN_FOLDERS = ("stain", "cli", "data")  # of the tests; the others are those of ER networks
TEST_PROCESSES = 8  # that run tests at the same time
TEST_SECONDS = 25  # that one test has, where pytest-timeout is installed
NO_TESTS = 5  # pytest's exit code
_RUNNING: set[subprocess.Popen[bytes]] = set()


@dataclass(frozen=True)
class GpuDevice:
    """The device, the folder of its cases, and how to build for it and test on it."""

    machine: dict[str, Any]
    folder: Path
    build: list[str]
    tests: dict[str, list[str]]
    """Files by group, of TEST_GROUPS."""
    sanitizer: str | None = None
    build_environment: dict[str, str] = field(default_factory=dict)
    marked: Sequence[str] = ()
    """Arguments that choose among the tests of a file."""


def marked_tests(folder: Path = ROOT / "tests") -> dict[str, list[str]]:
    """The files with tests marked `gpu`: the others may import what is not installed beside the device's torch."""
    groups: dict[str, list[str]] = {group: [] for group in TEST_GROUPS}
    for path in sorted(folder.rglob("test_*.py")):
        if MARKED.search(path.read_text()):
            groups["stain" if path.parent.name in STAIN_FOLDERS else "er"].append(str(path))
    return groups


def device_at_hand() -> GpuDevice:
    """The CUDA device that torch sees first."""
    known = shutil.which("compute-sanitizer")
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return GpuDevice(
        machine=describe("gpu"),
        folder=ROOT / "bench",
        build=[sys.executable, "setup.py", "build_ext", "--inplace"],
        tests=marked_tests(),
        sanitizer=known or (str(beside) if beside.exists() else None),
        build_environment={"ERNET_CUDA": "1"},
        marked=("-m", "gpu"),
    )


def emulator(folder: Path) -> GpuDevice:
    """The kernels run on the CPU: shows that the flow works, and says nothing about any GPU."""
    return GpuDevice(
        machine=describe("gpu-simulated") | {"name": "simulated-gpu"},
        folder=folder,
        build=[sys.executable, str(SIMULATED / "emulated.py"), str(ROOT / "build" / "simt")],
        tests={"stain": ["tests/bench/test_record.py"], "er": []},
    )


def call(command: list[str], log: Path, seconds: float, **environment: str) -> int:
    """Run a command with its output in `log`; returns the exit code, TIMED_OUT when it had to be stopped."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        _RUNNING.add(process)
        try:
            return process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
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


def tests(device: GpuDevice, group: str, logs: Path, deadline: Deadline) -> Iterator[Row]:
    """Run the tests of a group that need the device, a process a file, the rows of each file as it ends.

    A hang, a crash or a file that cannot be collected costs that file alone, and not the outcomes that it had before.
    """
    files = device.tests[group]
    if importlib.util.find_spec("pytest") is None:
        yield without_figures("tests", group, "skipped", "pytest is not installed for this interpreter")
        return
    each = min(TEST_PROCESSES, cores()) // max(1, len(files))
    with ThreadPoolExecutor(TEST_PROCESSES) as pool:
        found = [pool.submit(run_test_file, device, file, logs, deadline, each) for file in files]
        for future in as_completed(found):
            yield from future.result()


def run_test_file(device: GpuDevice, file: str, logs: Path, deadline: Deadline, processes: int) -> list[Row]:
    """One row for each test function of a file, and one for the file if something ended its run."""
    name = name_of_file(file)
    log, report = logs / f"{name}.log", (logs / f"{name}.jsonl").resolve()
    report.unlink(missing_ok=True)
    options = ["-o", "addopts=--import-mode=importlib", "-q", "-p", "no:cacheprovider", "-p", "gpu_outcomes"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        options += [f"--timeout={TEST_SECONDS}", "--timeout-method=thread"]
    if importlib.util.find_spec("xdist") is not None and processes > 1:
        options += ["-n", str(processes)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "ERNET_TEST_OUTCOMES": str(report)}
    seconds = deadline.left()
    if seconds < 1:
        return [without_figures("tests", name, "no time left", "it was not begun")]
    code = call([sys.executable, "-m", "pytest", *options, *device.marked, file], log, seconds, **environment)
    groups, running = outcomes_of(report)
    return [*rows_of_file(name, code, why(code, log, seconds), running), *rows_of_tests(groups)]


def rows_of_file(name: str, code: int, detail: str, running: list[str]) -> Iterator[Row]:
    """What ended the run of a file before its end, if anything did."""
    during = f"; during {', '.join(running[:3])}" if running else ""
    if code == TIMED_OUT:
        yield without_figures("tests", name, "no time left", f"{detail.partition(':')[0]}{during}; what ran is listed")
    elif code == NO_TESTS:
        yield without_figures("tests", name, "FAIL", "no test of it was found or chosen")
    elif code not in (0, 1):
        yield without_figures("tests", name, "FAIL", f"{detail}{during}"[:400])


def rows_of_tests(groups: dict[str, list[tuple[str, str]]]) -> Iterator[Row]:
    for name, outcomes in sorted(groups.items()):
        counts = Counter(kind for kind, _ in outcomes)
        verdict = "FAIL" if counts["failure"] + counts["error"] else "pass" if counts["passed"] else "skipped"
        detail = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items(), key=lambda item: item[0] != "passed"))
        messages = [message for kind, message in outcomes if kind != "passed" and message]
        yield without_figures("tests", name, verdict, f"{detail}: {messages[0]}" if messages else detail)


def name_of_file(file: str) -> str:
    """As its tests' rows begin: `tests.er.test_x`."""
    path = Path(file)
    if path.is_absolute():
        return dotted(str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name)
    return dotted(file)


def dotted(node: str) -> str:
    """The name of a row: `tests/er/test_x.py::test_y[1]` is `tests.er.test_x.test_y`."""
    path, _, function = node.partition("::")
    module = path.removesuffix(".py").replace("/", ".")
    return f"{module}.{function.partition('[')[0]}" if function else module


def outcomes_of(report: Path) -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    """Outcomes and messages of every test function's cases, as `gpu_outcomes` wrote them; and what has not ended."""
    groups: dict[str, list[tuple[str, str]]] = {}
    running: dict[str, None] = {}
    for text in report.read_text(errors="replace").splitlines() if report.exists() else ():
        with contextlib.suppress(ValueError):  # the last line of a run that was cut off
            line = json.loads(text)
            if line["outcome"] == "started":
                running[line["test"]] = None
                continue
            running.pop(line["test"], None)
            groups.setdefault(dotted(line["test"]), []).append((line["outcome"], line["message"]))
    return groups, list(running)


def sanitizer(device: GpuDevice, tool: str, logs: Path, seconds: float) -> Row:
    """Run every kernel once, on small inputs, under one tool of compute-sanitizer."""
    name = f"compute-sanitizer {tool}"
    if device.sanitizer is None:
        return row_of(name, "skipped", "compute-sanitizer is not installed here")
    log = logs / f"{tool}.log"
    # Without PyTorch's cache each tensor is an allocation of its own, and a read beyond one is seen. cuDNN reads what
    # it has not written, which is none of this library's.
    code = call(
        [device.sanitizer, "--tool", tool, "--error-exitcode", "9",
         sys.executable, "-u", str(WORKER), str(device.folder), "agreement_gpu"],
        log, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1", ERNET_WITHOUT_CUDNN=str(int(tool == "initcheck")),
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
