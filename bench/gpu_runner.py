"""The parent's side of gpu_worker.py: gives it cases, one after the other, and outlives whatever happens to it."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_case import Ceilings, GpuCase
from machine import ROOT
from record import Row, without_figures

WORKER = Path(__file__).with_name("gpu_worker.py")
PATIENCE = 30.0  # the least that a case is given
START_SECONDS = 60.0  # for Python and torch to be ready


class Deadline:
    """The end of the time that was given."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.end - time.monotonic())


@dataclass(frozen=True)
class Task:
    """A case and the module that it is in."""

    module: str
    case: GpuCase


class Runner:
    """Runs cases in a worker; a crash, a hang or a broken device costs one case and a new worker."""

    def __init__(self, folder: Path, log: Path, deadline: Deadline, patience: float = PATIENCE) -> None:
        self.folder, self.log, self.deadline, self.patience = folder, log, deadline, patience
        self.process: subprocess.Popen[str] | None = None
        self.answers: queue.Queue[str | None] = queue.Queue()

    def run(self, task: Task, ceilings: Ceilings) -> list[Row]:
        """The rows of one case, or one row that says why there are none."""
        case = task.case
        limit = max(self.patience, 5 * case.seconds)
        if self.deadline.left() < case.seconds:
            return [self._without(task, "no time left", f"needs about {case.seconds:.0f} s")]
        if self.process is None and not self._start():
            return [self._without(task, "FAIL", f"no worker started; {self._end_of(START_SECONDS)}")]
        limit = min(limit, self.deadline.left())
        figures = [ceilings.copy_gigabytes_per_second, ceilings.bf16_teraflops]
        request = {
            "module": task.module, "case": case.name,
            "ceilings": [None if value != value else value for value in figures],
        }  # fmt: skip
        answer = self._ask(request, limit)
        if answer is None:
            return [self._without(task, "FAIL", self._end_of(limit))]
        if "error" in answer:
            if answer["sticky"]:
                self.close()
            return [self._without(task, "FAIL", answer["error"][:400])]
        return [Row(**row) for row in answer["rows"]]

    def close(self) -> None:
        """End the worker."""
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    continue

    def _start(self) -> bool:
        """Start a worker; False if it did not get ready."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", str(WORKER), str(self.folder)],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self.answers = queue.Queue()
        threading.Thread(target=_forward, args=(self.process.stdout, self.answers), daemon=True).start()
        return self._answer(START_SECONDS) == {"ready": True}

    def _ask(self, request: dict[str, Any], limit: float) -> dict[str, Any] | None:
        """The answer; None if the worker died or took too long."""
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._answer(limit)

    def _answer(self, limit: float) -> dict[str, Any] | None:
        try:
            line = self.answers.get(timeout=limit)
        except queue.Empty:
            return None
        return json.loads(line) if line is not None else None

    def _end_of(self, limit: float) -> str:
        """Why there was no answer; the worker is gone afterwards."""
        assert self.process is not None
        try:
            code = self.process.wait(timeout=2)
            why = f"the process ended with signal {-code}" if code < 0 else f"the process ended with exit code {code}"
        except subprocess.TimeoutExpired:
            why = f"stopped after {limit:.0f} s"
        self.close()
        return f"{why}: {last_lines(self.log)}"[:400]

    @staticmethod
    def _without(task: Task, status: str, detail: str) -> Row:
        case = task.case
        known = {"title": case.title, "target": list(case.targets)}
        return without_figures(
            task.module, case.name, status, detail, **{key: value for key, value in known.items() if value}
        )


def _forward(stream: Any, answers: queue.Queue[str | None]) -> None:
    try:
        for line in stream:
            answers.put(line)
    except ValueError:  # closed while it was read
        pass
    answers.put(None)


def last_lines(log: Path, count: int = 3) -> str:
    """The end of a log, on one line."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return " | ".join(line.strip() for line in lines[-count:])[-300:]
