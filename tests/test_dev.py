"""dev.py and the GPU check, as far as they go without a GPU."""

from __future__ import annotations

import importlib.util
import runpy
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


def test_all_tests_are_spread_in_the_order_of_conftest():
    script = runpy.run_path(str(ROOT / "dev.py"))
    assert (
        script["workers"](sys.executable, ["tests/test_dev.py"]) == script["workers"](sys.executable, ["-n", "0"]) == []
    )
    assert script["workers"]("false", []) == []  # no interpreter with pytest-xdist
    if importlib.util.find_spec("xdist") is not None:
        assert script["workers"](sys.executable, ["-q"])[2:] == ["--dist", "loadfile", "--no-loadscope-reorder"]


def test_code_for_gpus_is_built_where_one_is_or_where_it_is_asked_for(monkeypatch):
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name in ("ERNET_CUDA", "ERNET_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(script, "gpu_present", lambda: False)
    monkeypatch.delenv("ERNET_ISAS", raising=False)
    assert script.what_to_build("test") == {"ERNET_CUDA": "0"}
    assert script.what_to_build("demo") == {"ERNET_CUDA": "0", "ERNET_ISAS": "native"}
    assert script.what_to_build("build") == {}  # setup.py decides
    assert script.what_to_build("kernels") == script.what_to_build("wheel") != {}
    monkeypatch.setenv("ERNET_CUDA_ARCHS", "90a")
    assert script.what_to_build("test") == {}
    monkeypatch.delenv("ERNET_CUDA_ARCHS")
    monkeypatch.setattr(script, "gpu_present", lambda: True)
    assert script.what_to_build("demo") == {"ERNET_ISAS": "native"}
