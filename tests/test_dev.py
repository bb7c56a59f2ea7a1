"""dev.py and the GPU check, as far as they go without a GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def dev(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "dev.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_gpu_record_keeps_the_rows_before_a_failure(tmp_path, monkeypatch):
    check = load(ROOT / "bench" / "gpu_check.py", monkeypatch)
    monkeypatch.setattr(check.torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(check.torch.cuda, "get_device_capability", lambda: (9, 0))
    record = check.Record(tmp_path)
    record.add("build", "pass", "3 s", seconds=3.0)

    def fails() -> None:
        raise RuntimeError("out of memory")

    check.guarded(record, "speed", fails)
    kept = json.loads(record.path.read_text())
    assert [(row["name"], row["verdict"]) for row in kept["rows"]] == [("build", "pass"), ("speed", "FAIL")]
    assert "out of memory" in kept["rows"][1]["detail"] and kept["machine"]["torch"] == torch.__version__
    assert "speed" in record.table()
