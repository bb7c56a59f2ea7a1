"""`ernet-fast bench`: table, JSON, files, exit codes."""

from __future__ import annotations

import builtins
import json
import sys

import pytest
import torch

from ernet_fast.benchmark import run, stain_questions
from ernet_fast.diagnosis import diagnose
from ernet_fast.processor import processor_text


@pytest.fixture(autouse=True)
def small_question(monkeypatch):
    """A few small images in place of the questions."""

    def small():
        images = stain_questions.tissue(3, 40, 40)
        return stain_questions.macenko("m", "Macenko, small", images, torch.device("cpu"), 1, each=True)

    monkeypatch.setattr(run, "stain_questions", lambda device, images: [small])


def bench(call, *more):
    return call("bench", "--only", "macenko", "--seconds", 1, "--device", "cpu", *more)


def test_table(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    called = bench(call)
    assert called.code == 0
    kept = sorted(path.name for path in (tmp_path / "ernet-fast-bench").iterdir())
    assert kept == ["bench.json", "bench.png"] and "written to ernet-fast-bench" in called.out
    assert "Macenko, small (1 thread)" in called.out and "ernet_fast" in called.out and "times slower" in called.out
    cpu = diagnose()["machine"]["cpu"]
    assert called.out.startswith(cpu["name"]) and processor_text(cpu).rpartition(", ")[0] in called.out
    assert "99 %" in called.out and "worst" in called.out and "at least" in called.out


def test_json_alone_writes_nothing(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench(call, "--json").json["answers"] and not list(tmp_path.iterdir())


def test_json_and_files(call, tmp_path):
    called = bench(call, "--json", "--out", tmp_path / "a" / "b")
    assert called.code == 0 and called.json == json.loads((tmp_path / "a" / "b" / "bench.json").read_text())
    (answer,) = called.json["answers"]
    own = answer["figures"][0]
    assert own["name"] == "ernet_fast" and own["images"] == 3 and 0 < own["p50_ms"] <= own["p99_ms"] <= own["max_ms"]
    assert called.json["packages"]["torch"] and called.json["device"] == "cpu"
    assert (tmp_path / "a" / "b" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_picture_and_a_warning(call, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importlib asks no __import__
    called = bench(call, "--out", tmp_path)
    assert called.code == 0 and "no picture: matplotlib is needed for" in called.err
    assert (tmp_path / "bench.json").exists() and not (tmp_path / "bench.png").exists()


def test_a_wrong_result_is_exit_code_1_and_no_figure(call, tmp_path, monkeypatch):
    right = stain_questions.macenko_normalize
    monkeypatch.setattr(stain_questions, "macenko_normalize", lambda *arguments: right(*arguments) ^ 8)
    called = bench(call, "--out", tmp_path)
    assert called.code == 1 and called.out == "" and "so no speed is reported" in called.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seconds", "0"], "seconds=0"),
        (["--only", "x"], "invalid choice"),
        (["x"], "usage"),
        (["--only", "er", "--images", "x"], "Leave one of them out"),
    ],
)
def test_wrong_usage(call, arguments, words):
    called = call("bench", *arguments)
    assert called.code == 2 and words in called.err and called.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_such_device(call):
    called = call("bench", "--device", "cuda")
    assert called.code == 2 and "no CUDA device here" in called.err


def test_model(call, tmp_path, monkeypatch):
    """The command measures, prints and writes; what is measured has its own tests."""
    from ernet_fast.benchmark.networks import networks

    keep = {"plain", "er"}
    monkeypatch.setattr(
        "ernet_fast.benchmark.model.networks",
        lambda *asked: [one for one in networks(*asked, base_channels=16) if one.key in keep],
    )
    monkeypatch.setattr("ernet_fast.benchmark.model._check_twins", lambda *_: None)
    small = ("bench", "model", "--model", "er_resnet18", "--batch", 2, "--size", 32, "--seconds", 0.01, "--no-compile")
    called = call(*small, "--out", tmp_path)
    assert called.code == 0 and "2 images of 32 x 32, float32, channels-last, 1 thread" in called.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.png"]
    found = json.loads((tmp_path / "model.json").read_text())
    assert [row["name"] for row in found["networks"]] == ["ResNet-18", "ER-ResNet-18"] and found["compiled"] is False
    called = call("bench", "model", "--batch", 1)
    assert called.code == 2 and "batch=1; expected 2 to 4096 images" in called.err and called.out == ""
