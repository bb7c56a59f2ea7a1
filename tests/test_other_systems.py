"""Windows and macOS, where there is no compiled library: the package imports, and says what is missing and why."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ernet_fast import _backend, _library

ROOT = Path(__file__).resolve().parent.parent
# A system as a process sees it: its name, and without the modules that it lacks. torch was imported before, as its own
# code would look for files of that system.
SYSTEM = """
import sys
import numpy, torch
import torch.utils.data, torch.nn.attention
from pathlib import Path
sys.platform = {platform!r}
for name in {lacks!r}:
    sys.modules[name] = None
exists = Path.exists
Path.exists = lambda path, **options: path.name != "libernet.so" and exists(path, **options)
"""
USE = """
import warnings
warnings.simplefilter("ignore")
import ernet_fast, ernet_fast.data, ernet_fast.models, ernet_fast.stain, ernet_fast.cli, ernet_fast.scale.files
from ernet_fast import _backend
from ernet_fast.console.atomic_file import remove_abandoned, write_text
from ernet_fast.diagnosis import diagnose
x = torch.randn(2, 3, 32, 32)
y = ernet_fast.er_resnet18(num_classes=2)(x)
y.sum().backward()
tiles = torch.randint(30, 230, (2, 3, 32, 32), dtype=torch.uint8)
assert ernet_fast.stain.MacenkoNormalizer()(tiles).shape == tiles.shape
write_text("text", "written")
remove_abandoned(".")
assert open("text").read() == "written"
print(diagnose()["extension"]["reason"])
"""


@pytest.mark.parametrize(
    ("platform", "lacks"), [("win32", ["fcntl", "resource", "pwd", "grp", "termios"]), ("darwin", [])]
)
def test_the_python_code_works_without_the_library(platform, lacks, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SYSTEM.format(platform=platform, lacks=lacks) + USE],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "built for Linux (x86-64, arm64) alone" in done.stdout and platform in done.stdout


def test_on_linux_the_advice_is_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(_backend, "PATH", tmp_path / "libernet.so")
    monkeypatch.delenv("ERNET_DISABLE_EXTENSION", raising=False)
    library, reason = _backend._load.__wrapped__()
    assert library is None and "Install a C++ compiler" in reason
    (tmp_path / "libernet.so").write_text("no library")
    monkeypatch.setattr(_backend, "Library", lambda: _library.Library(tmp_path / "libernet.so"))
    library, reason = _backend._load.__wrapped__()
    assert library is None and reason.startswith("libernet.so does not load: ")


SETUP = """
import runpy, setuptools, sys, sysconfig
setuptools.setup = lambda **arguments: None
sys.modules.update(dict.fromkeys({lacks!r}))
script = runpy.run_path("setup.py")
{system}
from setuptools import Distribution, Extension
distribution = Distribution({{"name": "x", "version": "1", "ext_modules": [Extension("ernet_fast.libernet", [])]}})
command = script["NinjaBuild"](distribution)
command.ensure_finalized()
command.build_lib = {folder!r}
command.run()
wheel = script["LibraryWheel"](distribution)
wheel.ensure_finalized()
print(wheel.get_tag())
"""


def set_up(
    folder: Path, system: str, lacks: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    code = SETUP.format(system=system, lacks=lacks, folder=str(folder))
    variables = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_setup_installs_the_python_code_alone_elsewhere(platform, tmp_path):
    done = set_up(tmp_path, f"sys.platform = {platform!r}", lacks=["fcntl"])
    assert done.returncode == 0, done.stderr
    assert "compiled operators are for Linux" in done.stderr and "('py3', 'none', 'any')" in done.stdout


def test_setup_without_a_compiler_installs_the_python_code_alone(tmp_path):
    left = tmp_path / "ernet_fast" / "libernet.so"  # of a build before
    left.parent.mkdir()
    left.touch()
    done = set_up(tmp_path, "", PATH=str(tmp_path), CXX="")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler found" in done.stderr and "('py3', 'none', 'any')" in done.stdout
    assert not left.exists()


def test_setup_refuses_musl_with_a_sentence(tmp_path):
    done = set_up(
        tmp_path,
        "find = sysconfig.get_config_var\n"
        "sysconfig.get_config_var = lambda name: 'cpython-312-x86_64-linux-musl' if name == 'SOABI' else find(name)",
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("ernet_fast: this Python uses musl (Alpine Linux)")


def test_setup_names_an_unknown_instruction_set():
    code = (
        "import runpy, setuptools; setuptools.setup = lambda **a: None;runpy.run_path('setup.py')['instruction_sets']()"
    )
    variables = {**os.environ, "ERNET_ISAS": "avx2;sse9"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 1 and "ERNET_ISAS names sse9; expected native, portable" in done.stderr


def test_code_for_gpus_is_left_out_where_torch_has_no_cuda():
    code = (
        "import runpy, setuptools; setuptools.setup = lambda **a: None; find = runpy.run_path('setup.py')['find_nvcc'];"
        "print(find(False), find(True))"
    )
    variables = {name: value for name, value in os.environ.items() if not name.startswith("ERNET_CUDA")}
    found = {}
    for asked in ({}, {"ERNET_CUDA": "0"}, {"ERNET_CUDA_ARCHS": "80"}):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=variables | asked, capture_output=True, text=True, check=True
        )
        found[str(asked)] = done.stdout.split()
    assert found["{}"][0] == "None" and found["{'ERNET_CUDA': '0'}"] == ["None", "None"]
    with_cuda, asked_for = found["{}"][1], found["{'ERNET_CUDA_ARCHS': '80'}"]
    assert asked_for == [with_cuda, with_cuda]
