"""Exit codes, messages, and what goes to which stream."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ernet_fast
from ernet_fast.cli import doctor
from ernet_fast.cli.failures import describe, exit_code

ROOT = Path(__file__).resolve().parents[2]


def test_version_and_help(call):
    assert call("--version").out.strip() == f"ernet_fast {ernet_fast.__version__}"
    top = call("--help")
    names = (
        "demo",
        "train",
        "evaluate",
        "predict",
        "attend",
        "export",
        "normalize",
        "segment",
        "data",
        "bench",
        "doctor",
    )
    assert top.code == 0 and all(name in top.out for name in names)
    for name in names:
        shown = call(*(("data", "verify") if name == "data" else (name,)), "--help")
        assert shown.code == 0 and "--debug" in shown.out and "usage: ernet-fast" in shown.out


@pytest.mark.parametrize("arguments", [[], ["fly"], ["train", "--epochs", "many"], ["normalize", "in"]])
def test_wrong_usage_exits_2(call, arguments):
    called = call(*arguments)
    assert called.code == 2 and "usage: ernet-fast" in called.err and called.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "/nowhere", "--out", "{tmp}/run"], "root '/nowhere' does not exist"),
        (["train", "--data", "/nowhere"], "--out is missing"),
        (["train", "--out", "{tmp}/run"], "--data is missing"),
        (["train", "--out", "{tmp}/run", "--resume"], "nothing to resume"),
        (["train", "--data", "d", "--out", "o", "--epochs", "0"], "epochs=0"),
        (["train", "--data", "d", "--out", "o", "--stop-after", "0"], "--stop-after 0"),
        (["evaluate", "/nowhere/best.pt"], "no checkpoint at '/nowhere/best.pt'"),
        (["evaluate", "x.pt", "--max-images", "0"], "max_images=0"),
        (["normalize", "/nowhere", "{tmp}/out"], "no file or folder '/nowhere'"),
        (["demo", "--epochs", "0"], "epochs=0"),
    ],
)
def test_wrong_input_exits_2_with_a_short_message(call, tmp_path, arguments, message):
    called = call(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert called.code == 2 and called.out == ""
    assert message in called.err and called.err.startswith(f"ernet-fast {arguments[0]}: ")
    assert len(called.err.strip().splitlines()) <= 2 and "Traceback" not in called.err


def test_debug_shows_the_traceback(call):
    called = call("evaluate", "/nowhere/best.pt", "--debug")
    assert called.code == 2 and "Traceback" in called.err and "FileNotFoundError" in called.err


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (ValueError("bad"), 2, ["ernet-fast doctor: bad"]),
        (PermissionError(13, "Permission denied", "/x"), 1, ["ernet-fast doctor: Permission denied: /x"]),
        (RuntimeError("first\nsecond\nthird"), 1, ["ernet-fast doctor: first", "  second third"]),
        (ImportError("PIL is needed"), 1, ["ernet-fast doctor: PIL is needed"]),
        (
            KeyError("x"),
            1,
            ["ernet-fast doctor: KeyError: 'x'", "  This looks like a fault of ernet_fast; --debug shows where."],
        ),
        (ValueError(), 2, ["ernet-fast doctor: ValueError"]),
    ],
)
def test_every_error_becomes_a_message_and_a_code(call, monkeypatch, error, code, lines):
    def fail():
        raise error

    monkeypatch.setattr(doctor, "diagnose", fail)
    called = call("doctor")
    assert called.code == code == exit_code(error) and called.err.splitlines() == lines


def test_long_messages_are_cut():
    assert len(describe(RuntimeError("first\n" + "word " * 1000))) < 500


def test_interrupt_exits_1(call, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "diagnose", interrupt)
    called = call("doctor")
    assert called.code == 1 and called.err == "ernet-fast: interrupted\n"


def test_python_dash_m_and_a_reader_that_leaves(tmp_path):
    """`python -m ernet_fast doctor | head -1` ends quietly."""
    command = f"{sys.executable} -m ernet_fast doctor | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("ernet_fast ") and done.stderr == ""
