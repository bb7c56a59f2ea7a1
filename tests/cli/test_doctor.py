"""The doctor works without any optional package and says what serves what."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ernet_fast import _backend
from ernet_fast._backend import serves_capability
from ernet_fast.stain import deprecated_operators

ROOT = Path(__file__).resolve().parents[2]
CUDA_ONLY = ("macenko_separate",)

CORE_ONLY = """
import sys

class Blocked:
    names = {blocked!r}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
from ernet_fast.cli import main
sys.exit(main({arguments!r}))
"""
OPTIONAL = (
    "PIL lightning_fabric torchmetrics matplotlib sklearn kornia rich torchstain timm torchvision triton safetensors "
    "tifffile openslide imagecodecs"
).split()


def core_only(*arguments: str, blocked=OPTIONAL, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process that has torch and numpy alone, or lacks the packages named."""
    import os

    code = CORE_ONLY.format(blocked=set(blocked), arguments=list(arguments))
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_json(call):
    called = call("doctor", "--json")
    found = called.json
    assert called.code == 0 and called.err == ""
    assert found["extension"]["available"] == _backend.extension_available()
    assert found["extension"]["build"] == _backend.build_info()
    assert found["extension"]["caches"] == _backend.caches()
    assert found["extension"]["streaming"] == _backend.streaming()
    versions = {package["name"]: package["version"] for package in found["packages"]}
    assert versions["torch"] == importlib.metadata.version("torch")
    known = {
        name.removeprefix("ernet::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("ernet::")
    }
    known -= set(deprecated_operators.NAMES)
    assert {row["operator"] for row in found["operators"]} >= known, "an operator the doctor does not know"
    for row in found["operators"]:
        assert row["why"] and row["backend"]
        if row["device"] == "cpu":
            compiled = "C++ and PyTorch" if row["operator"] in CUDA_ONLY else "C++"
            assert row["backend"] == (compiled if _backend.extension_available() else "PyTorch reference")
        elif not torch.cuda.is_available():
            assert (row["backend"], row["why"]) == ("-", "no CUDA device here")


def test_table(call):
    shown = call("doctor").out
    assert "macenko_normalize" in shown and "weighted_sum" in shown and "instruction sets" in shown
    compiled = ("CPU caches: ", "CPU maps: ", "kept for later")
    assert not _backend.extension_available() or all(part in shown for part in compiled)


def test_core_only_install():
    found = core_only("doctor", "--json")
    assert found.returncode == 0 and found.stderr == ""
    packages = {package["name"]: package["version"] for package in json.loads(found.stdout)["packages"]}
    assert packages["numpy"] and packages["torch"]
    assert {name for name, version in packages.items() if version is None} >= {"pillow", "torchmetrics", "rich"}
    assert core_only("train", "--help").returncode == 0


def test_a_command_that_needs_more_names_the_fix(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    done = core_only("normalize", str(tmp_path), str(tmp_path.parent / "out"))
    assert done.returncode == 1 and "pip install 'ernet_fast[train]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_without_numpy():
    """Nothing but the diagnosis works then, and each other command says why."""
    found = core_only("doctor", "--json", blocked=[*OPTIONAL, "numpy"])
    assert found.returncode == 0
    packages = {package["name"]: package["version"] for package in json.loads(found.stdout)["packages"]}
    assert packages["numpy"] is None and packages["torch"]
    done = core_only("normalize", "a", "b", "--json", blocked=["numpy"])
    assert done.returncode == 1 and "No module named 'numpy'; see ernet-fast doctor" in done.stderr
    assert "not available: No module named 'numpy'" in core_only("--help", blocked=["numpy"]).stdout


def test_without_the_compiled_operators():
    done = core_only("doctor", ERNET_DISABLE_EXTENSION="1")
    assert done.returncode == 0
    assert "compiled operators: no. ERNET_DISABLE_EXTENSION is set" in done.stdout
    assert "PyTorch reference" in done.stdout and "C++" not in done.stdout


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        (["80", "90a"], (8, 0), True),
        (["80", "90a"], (8, 9), True),
        (["80", "90a"], (9, 0), True),
        (["80"], (9, 0), False),
        (["86"], (8, 0), False),
        (["100", "120"], (10, 3), True),
        (["100a"], (10, 3), False),
        (["120"], (12, 0), True),
        ([], (8, 0), False),
        (["nonsense"], (8, 0), False),
    ],
)
def test_which_devices_machine_code_serves(architectures, capability, expected):
    assert serves_capability(architectures, *capability) is expected
