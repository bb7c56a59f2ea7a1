"""Statistics taken over the processes of a group: two processes of gloo, see two_processes.py for the checks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECKS = Path(__file__).with_name("two_processes.py")
ROOT = CHECKS.parent.parent.parent

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(CHECKS)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        results = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    names = re.findall(r"^def (check_\w+)", CHECKS.read_text(), re.MULTILINE)
    for process, (output, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors[-4000:]
        assert output.splitlines() == [f"passed {name}" for name in names] and len(names) >= 7
