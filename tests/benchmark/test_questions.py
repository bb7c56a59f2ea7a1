"""Questions: results are compared before anything is timed, and whoever cannot answer is named."""

from __future__ import annotations

import json
import sys
import time
import types

import numpy as np
import pytest
import torch

from ernet_fast.benchmark import Agreement, BenchmarkConfig, Contestant, Question, er_questions, question, run
from ernet_fast.benchmark.interleaved import percentiles, time_interleaved
from ernet_fast.benchmark.macenko_peers import as_levels
from ernet_fast.benchmark.question import ask
from ernet_fast.benchmark.show import answer_text, duration, picture, rate
from ernet_fast.benchmark.stain_questions import macenko, same_levels, tissue
from ernet_fast.console.progress import Reporter

CPU = torch.device("cpu")


def nothing() -> None:
    pass


def contestant(name, value=1.0, seconds=0.0):
    def call():
        time.sleep(seconds)
        return value

    return Contestant(name, lambda: call)


def asked(others, own=None, expected=1.0, items=2, threads=None):
    def verify(result):
        assert result == expected, f"{result}, not {expected}"

    def agreement(found, mine):
        return Agreement(found == mine, f"{found} and {mine}")

    own = own or contestant("ernet_fast", seconds=0.02)
    return Question("q", "a question", own, others, verify, agreement, items, threads)


def test_figures_are_those_measured():
    answer = ask(asked([contestant("slow", seconds=0.06)]), 0.5, nothing)
    first, second = answer.figures
    assert first["name"] == "ernet_fast" and first["times_slower"] == 1 and first["repeats"] == second["repeats"] >= 1
    assert 20 <= first["p50_ms"] < second["p50_ms"] and second["p50_ms"] >= 60
    assert first["items_per_second"] == pytest.approx(2e3 / first["p50_ms"])
    assert second["times_slower"] == pytest.approx(second["p50_ms"] / first["p50_ms"])
    assert first["p20_ms"] <= first["p50_ms"] <= first["p80_ms"]
    json.dumps(answer.to_json(), allow_nan=False)


def test_a_wrong_own_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(question, "time_interleaved", lambda *arguments, **options: pytest.fail("it was timed"))
    with pytest.raises(
        RuntimeError, match=r"a question: the result of ernet_fast is wrong, so no speed .*: 2.0, not 1"
    ):
        ask(asked([], own=contestant("ernet_fast", 2.0)), 1, nothing)


def test_whoever_computes_something_else_is_marked():
    answer = ask(asked([contestant("other", 3.0)]), 0.1, nothing)
    assert [figure["same_result"] for figure in answer.figures] == [True, False]
    text = answer_text(answer.to_json())
    assert "another *" in text and "* other: 3.0 and 1.0" in text


def test_whoever_cannot_answer_is_named_and_the_rest_is_measured():
    def absent():
        raise ModuleNotFoundError("No module named 'stainx'", name="stainx")

    def broken():
        raise RuntimeError("operator does not exist\nand more")

    def fails_when_called():
        return lambda: 1 / 0

    others = [Contestant("a", absent), Contestant("b", broken), Contestant("c", fails_when_called), contestant("d")]
    answer = ask(asked(others), 0.1, nothing)
    assert [figure["name"] for figure in answer.figures] == ["ernet_fast", "d"]
    assert answer.missing == [
        {"name": "a", "reason": "stainx is not installed"},
        {"name": "b", "reason": "RuntimeError: operator does not exist"},
        {"name": "c", "reason": "ZeroDivisionError: division by zero"},
    ]
    assert "not measured: a: stainx is not installed" in answer_text(answer.to_json())


def test_threads_are_as_the_question_asks_and_as_before_afterwards():
    before = torch.get_num_threads()
    seen = []
    own = Contestant("ernet_fast", lambda: lambda: seen.append(torch.get_num_threads()) or 1.0)
    torch.set_num_threads(2)
    try:
        assert ask(asked([], own=own, threads=1), 0.01, nothing).threads == 1
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_rounds_interleave_and_the_first_does_not_count():
    order = []
    calls = {name: (lambda name=name: order.append(name) or time.sleep(0.03)) for name in "ab"}
    times = time_interleaved(calls, rounds=3)
    assert order == ["a", "b"] * 4 and [len(values) for values in times.values()] == [3, 3]
    assert len(time_interleaved(calls, rounds=9, budget=0.0)["a"]) == 5, "fewer are no median"
    assert len(time_interleaved(calls, rounds=9, budget=0.0, least_rounds=1)["a"]) == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3, 1, 2], (1.4, 2, 2.6)), ([1, 2], (1.2, 1.5, 1.8)), ([5], (5, 5, 5)), (range(11), (2, 5, 8))],
)
def test_percentiles(values, expected):
    assert percentiles(values) == pytest.approx(dict(zip(("p20", "p50", "p80"), expected, strict=True)))
    assert percentiles(values, 1e3)["p80"] == pytest.approx(1e3 * expected[2])
    with pytest.raises(ValueError, match="values is empty"):
        percentiles([])


def test_levels_of_every_kind_of_result():
    levels = np.arange(2 * 4 * 5 * 3).reshape(2, 4, 5, 3).astype(np.int16)
    planar = torch.from_numpy(levels.transpose(0, 3, 1, 2).copy())
    for same in (levels, planar, planar.double(), list(levels), [torch.from_numpy(one) for one in levels]):
        assert np.array_equal(as_levels(same), levels)
    assert np.array_equal(as_levels(torch.full((1, 3, 4, 5), 0.5)), np.full((1, 4, 5, 3), 127))
    assert same_levels(levels, planar).same
    assert same_levels(levels + 3, planar).same and not same_levels(levels + 4, planar).same
    assert not same_levels(levels[:1], planar).same


def test_macenko_agrees_with_torchstain_and_its_own_reference():
    pytest.importorskip("torchstain")
    answer = ask(macenko("m", "Macenko", tissue(2, 61, 47), CPU, 1), 0.2, nothing)
    figures = {figure["name"]: figure for figure in answer.figures}
    assert figures["torchstain numpy"]["same_result"] and figures["torchstain torch"]["same_result"]
    assert figures["torchstain numpy"]["version"]


def test_peers_are_called_as_they_are_documented(monkeypatch):
    """stainx and torch-staintools, faked: fitted to the target, then given the whole batch in their own format."""
    given = {}

    class Macenko:
        def __init__(self, device, backend):
            given["stainx"] = (device, backend)

        def fit(self, target):
            given["stainx fit"] = tuple(target.shape), target.dtype

        def transform(self, batch):
            return batch

    class Builder:
        @staticmethod
        def build(method):
            made = torch.nn.Identity()
            made.fit = lambda target: given.update(fit=(method, tuple(target.shape), float(target.max())))
            return made

    monkeypatch.setitem(sys.modules, "stainx", types.SimpleNamespace(Macenko=Macenko))
    for name in ("torch_staintools", "torch_staintools.normalizer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    factory = types.SimpleNamespace(NormalizerBuilder=Builder)
    monkeypatch.setitem(sys.modules, "torch_staintools.normalizer.factory", factory)
    answer = ask(macenko("m", "Macenko", tissue(2, 41, 37), CPU, 1), 0.01, nothing)
    figures = {figure["name"]: figure for figure in answer.figures}
    assert given["stainx"] == ("cpu", "torch") and given["stainx fit"] == ((1, 3, 300, 300), torch.uint8)
    assert given["fit"][:2] == ("macenko", (1, 3, 300, 300)) and given["fit"][2] <= 1
    for name in ("stainx", "torch-staintools"):
        assert not figures[name]["same_result"], "the image itself is not the normalised image"


def test_the_shortcut_sum_agrees_with_the_reference(monkeypatch):
    monkeypatch.setattr(er_questions, "SHAPE", (2, 8, 7, 7))
    answer = ask(er_questions.shortcut_sum(CPU, compiled=False), 0.05, nothing)
    assert [figure["same_result"] for figure in answer.figures] == [True, True]
    monkeypatch.setattr(er_questions, "er_shortcut_sum", lambda xs, weight, relu: (xs[0] * weight[0, 0]).relu())
    with pytest.raises((RuntimeError, TypeError)):
        ask(er_questions.shortcut_sum(CPU, compiled=False), 0.05, nothing)


def test_the_network_agrees_with_the_naive_composition():
    answer = ask(er_questions.training_step(CPU, side=128, batch=2), 0.05, nothing)
    assert [figure["same_result"] for figure in answer.figures] == [True, True]


def test_the_whole_run_asks_every_question(monkeypatch):
    names = []

    def answered(asked_question, seconds, wait):
        names.append((asked_question.name, round(seconds, 3)))
        return question.Answer(asked_question.name, "t", 1, 1)

    monkeypatch.setattr(run, "ask", answered)
    found = run.run_benchmark(BenchmarkConfig(seconds=60, device="cpu", compiled=False), Reporter(quiet=True))
    assert [name for name, _ in names] == [
        "macenko-224",
        "macenko-700x460",
        "macenko-batch",
        "er-shortcut",
        "er-resnet50",
    ]
    assert sum(seconds for _, seconds in names) == pytest.approx(60) and len(found["answers"]) == 5
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"seconds": 0}, "seconds=0"), ({"seconds": float("nan")}, "seconds=nan"), ({"only": "x"}, "only='x'")],
)
def test_wrong_configurations(options, words):
    with pytest.raises(ValueError, match=words):
        BenchmarkConfig(**options)


def test_devices():
    with pytest.raises(ValueError, match="device='tpu'"):
        run.device_of("tpu")
    if not torch.cuda.is_available():
        assert run.device_of("auto") == CPU
        with pytest.raises(ValueError, match="no CUDA device here"):
            run.device_of("cuda")


def test_figures_as_people_read_them(tmp_path):
    assert [duration(value) for value in (1234.5, 12.345, 0.01234)] == ["1.23 s", "12.3 ms", "12.3 us"]
    assert [rate(value) for value in (12345, 999, 1.5)] == ["12.3 k", "999", "1.5"]
    answer = ask(asked([contestant("other", 3.0), contestant("same")]), 0.01, nothing).to_json()
    picture({"answers": [answer, answer]}, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
