"""dev.py and the GPU check, as far as they go without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def dev(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "dev.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_usage_and_unknown_commands():
    assert dev().returncode == 2
    assert "demo | test" in dev("--help").stdout
    wrong = dev("tets")
    assert wrong.returncode == 2 and "no command 'tets'" in wrong.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_gpu_check_without_a_gpu_is_one_line():
    result = dev("gpu")
    assert result.returncode == 1
    assert result.stdout.strip().splitlines() == ["dev.py gpu: no NVIDIA GPU here; nothing was built, run or recorded."]
    assert result.stderr == ""
