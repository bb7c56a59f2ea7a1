"""What only a GPU can prove, in one command: `python3 dev.py gpu`.

Builds for the GPU at hand, runs the tests marked `gpu`, loads a binary built elsewhere where one is given, measures the
copy bandwidth, the ER operators and the compiled Macenko passes, writes a record after every step (a run that is cut
off loses nothing) and prints a short table last. A failing step does not stop the others. Uses the running
interpreter's torch; needs no network.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from bench_er_gpu import measure_all
from gpu_timing import copy_bandwidth, milliseconds

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def output_of(*command: str) -> str:
    """What a command prints, or "" where it cannot run."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


class Record:
    """The rows of a run and the machine they come from, kept on disk."""

    def __init__(self, folder: Path) -> None:
        name = torch.cuda.get_device_name().replace(" ", "-")
        commit = output_of("git", "rev-parse", "--short", "HEAD") or "unknown"
        now = datetime.now(timezone.utc)
        self.rows: list[dict[str, Any]] = []
        self.machine = {
            "gpu": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "clocks": output_of(
                "nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm", "--format=csv,noheader"
            ),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "commit": commit,
            "dirty": bool(output_of("git", "status", "--porcelain", "--untracked-files=no")),
            "time": now.isoformat(timespec="seconds"),
        }
        self.path = folder / f"{name}-{now:%Y%m%d}-{commit}.json"

    def add(self, name: str, verdict: str, detail: str = "", **values: Any) -> None:
        """Append a row and write everything to disk."""
        self.rows.append({"name": name, "verdict": verdict, "detail": detail, **values})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"machine": self.machine, "rows": self.rows}, indent=1) + "\n")
        print(f"[{verdict}] {name}: {detail}", flush=True)

    def table(self) -> str:
        """The short table that ends a run."""
        width = max(len(row["name"]) for row in self.rows)
        lines = [f"{row['name']:{width}}  {row['verdict']:8}  {row['detail']}" for row in self.rows]
        return "\n".join([f"{self.machine['gpu']}, torch {self.machine['torch']}, {self.machine['commit']}", *lines])


def run(command: list[str], log: Path, timeout: float, **environment: str) -> int:
    """Run a command with its output in `log`; returns the exit code, 124 when it ran too long."""
    with log.open("w") as file:
        try:
            return subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return 124


def last_lines(log: Path, count: int = 3) -> str:
    """The end of a log, on one line."""
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-count:])[-300:]


def step_build(record: Record, logs: Path) -> None:
    """Build the extension for this GPU."""
    log, start = logs / "build.log", time.perf_counter()
    code = run([sys.executable, "setup.py", "build_ext", "--inplace"], log, 480, ERNET_CUDA="1")
    seconds = time.perf_counter() - start
    record.add(
        "build", "pass" if code == 0 else "FAIL", f"{seconds:.0f} s" if code == 0 else last_lines(log), seconds=seconds
    )


def step_tests(record: Record, logs: Path) -> None:
    """Run the tests marked `gpu`; one row for each test function."""
    log, report = logs / "tests.log", logs / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={report}", "-p", "no:cacheprovider"]
    code = run(command, log, 540, PYTHONPATH=str(ROOT))
    if not report.exists():
        record.add("tests", "FAIL", f"exit code {code}: {last_lines(log)}")
        return
    groups: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        groups.setdefault(f"{case.get('classname', '')}.{case.get('name', '').split('[')[0]}", []).append(outcome)
    if not groups:
        record.add("tests", "FAIL", f"no test ran: {last_lines(log)}")
    for name, outcomes in sorted(groups.items()):
        counts = {kind: outcomes.count(kind) for kind in ("passed", "failure", "error", "skipped")}
        bad = counts["failure"] + counts["error"]
        verdict = "FAIL" if bad else "pass" if counts["passed"] else "skipped"
        record.add(name, verdict, ", ".join(f"{n} {kind}" for kind, n in counts.items() if n), **counts)


FOREIGN = """
import ctypes, os, sys, torch
ctypes.CDLL(sys.argv[1], mode=os.RTLD_LAZY | os.RTLD_LOCAL)
x = torch.randn(2, 3, 5, 7)
mean, var = torch.ops.ernet.channel_moments(x, False)
torch.testing.assert_close(mean, x.mean((0, 2, 3)))
torch.testing.assert_close(var, x.var((0, 2, 3), correction=0))
if torch.cuda.is_available():
    image = torch.randint(0, 255, (2, 3, 61, 67), dtype=torch.uint8)
    cpu = torch.ops.ernet.macenko_moments(image, 240.0, 0.15)
    gpu = torch.ops.ernet.macenko_moments(image.cuda(), 240.0, 0.15)
    torch.testing.assert_close(gpu.cpu(), cpu)
print("loaded and correct under torch", torch.__version__)
"""


def step_foreign_binary(record: Record, logs: Path, binary: Path | None) -> None:
    """Load a binary that was built with another torch's headers, and run an operator of each device."""
    name = "binary built elsewhere"
    if binary is None:
        record.add(name, "skipped", "none given (--binary FILE, an _C*.so built with another torch)")
        return
    log = logs / "binary.log"
    code = run([sys.executable, "-c", FOREIGN, str(binary.resolve())], log, 120)
    record.add(name, "pass" if code == 0 else "FAIL", last_lines(log, 1))


def step_speed(record: Record) -> None:
    """Copy bandwidth, and each compiled Macenko pass as a share of it."""
    sys.path.insert(0, str(ROOT))
    import ernet_fast  # noqa: F401  (registers the operators)
    from ernet_fast.stain import macenko_fit

    bandwidth, timing = copy_bandwidth()
    record.add("copy bandwidth", "measured", f"{bandwidth:.0f} GB/s", gigabytes_per_second=bandwidth, **timing)
    generator = torch.Generator().manual_seed(0)
    tissue = torch.randint(60, 230, (16, 3, 224, 224), generator=generator, dtype=torch.uint8)
    images = tissue.repeat(64, 1, 1, 1).cuda()
    fit = [t.cuda() for t in macenko_fit(tissue)]
    stains, maxima = fit[0].repeat(64, 1, 1), fit[1].repeat(64, 1)
    passes = {
        "macenko_moments 1024 x 224 x 224": (lambda: torch.ops.ernet.macenko_moments(images, 240.0, 0.15), 1),
        "macenko_reconstruct 1024 x 224 x 224": (
            lambda: torch.ops.ernet.macenko_reconstruct(images, stains, maxima, stains, maxima, 240.0),
            2,
        ),
    }
    for name, (function, accesses) in passes.items():
        timing = milliseconds(function)
        rate = accesses * images.numel() / timing["p50"] / 1e6
        share = rate / bandwidth
        detail = f"{rate:.0f} GB/s, {100 * share:.0f} % of copy, {images.shape[0] / timing['p50'] * 1e3:,.0f} images/s"
        record.add(name, "measured", detail, gigabytes_per_second=rate, share_of_copy=share, **timing)


def step_er_speed(record: Record) -> None:
    """Each ER operator on each stage, as a share of the copy bandwidth."""
    sys.path.insert(0, str(ROOT))
    bandwidth, _ = copy_bandwidth()
    for name, found in measure_all(bandwidth):
        rate, share = found["gigabytes_per_second"], found["share_of_copy"]
        record.add(name, "measured", f"{rate:.0f} GB/s, {100 * share:.0f} % of copy", **found)


def guarded(record: Record, name: str, step: Any, *arguments: Any) -> None:
    """Run a step; an exception becomes a row."""
    try:
        step(*arguments)
    except Exception as error:  # the other steps must still run
        record.add(name, "FAIL", f"{type(error).__name__}: {error}"[:300])


def main() -> int:
    """Run every step; exit code 1 if one failed."""
    parser = argparse.ArgumentParser(prog="dev.py gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record (default bench/results)")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "gpu", help="folder of the logs")
    parser.add_argument("--binary", type=Path, help="an _C*.so built with another torch, to be loaded under this one")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("dev.py gpu: no CUDA device here; nothing was run or recorded.")
        return 1
    options.logs.mkdir(parents=True, exist_ok=True)
    record = Record(options.out)
    guarded(record, "build", step_build, record, options.logs)
    guarded(record, "tests", step_tests, record, options.logs)
    guarded(record, "binary built elsewhere", step_foreign_binary, record, options.logs, options.binary)
    guarded(record, "speed", step_speed, record)
    guarded(record, "ER speed", step_er_speed, record)
    print(f"\nrecord: {record.path}\n\n{record.table()}")
    return 1 if any(row["verdict"] == "FAIL" for row in record.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
