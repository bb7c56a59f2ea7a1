"""Questions: results are compared before anything is timed, and whoever cannot answer is named."""

from __future__ import annotations

import json
import sys
import time
import types

import numpy as np
import pytest
import torch

from ernet_fast.benchmark import (
    Agreement,
    BenchmarkConfig,
    Contestant,
    Question,
    er_questions,
    interleaved,
    question,
    run,
    stain_questions,
)
from ernet_fast.benchmark.interleaved import over_images, percentiles, ratios, time_interleaved, time_over_images
from ernet_fast.benchmark.macenko_peers import as_levels
from ernet_fast.benchmark.question import ask
from ernet_fast.benchmark.show import answer_text, duration, picture, rate
from ernet_fast.benchmark.stain_questions import macenko, same_levels, tissue
from ernet_fast.benchmark.users_images import UsersImages
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


def test_percentiles_over_images():
    found = over_images(range(101), 2.0)
    assert found == pytest.approx({"p20": 40, "p50": 100, "p80": 160, "p90": 180, "p99": 198, "max": 200})
    assert set(over_images([3.0]).values()) == {3.0}


def test_ratios_are_those_of_images():
    assert ratios({0: 1.0, 1: 2.0, 2: 4.0}, {0: 10.0, 2: 20.0, 3: 1.0}) == (7.5, 5.0)
    with pytest.raises(ValueError, match="no image"):
        ratios({0: 1.0}, {1: 1.0})


@pytest.fixture
def clock(monkeypatch):
    """A clock that calls move on: clock(seconds, note) makes such a call."""
    now = [0.0]
    monkeypatch.setattr(interleaved, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(question, "time", interleaved.time)

    def call_of(seconds, note=nothing):
        def call():
            now[0] += seconds
            note()
            return seconds

        return call

    return call_of


def test_a_contestant_meets_an_image_again_after_all_others(clock):
    """Short calls follow one on the image before that does not count, long ones do not."""
    order = []

    def calls_of(name, seconds, images):
        return {image: clock(seconds, lambda image=image: order.append((name, image))) for image in images}

    calls = {"slow": calls_of("slow", 0.006, (0, 2)), "quick": calls_of("quick", 0.001, range(3))}
    times = time_over_images(calls, rounds=2)
    assert times["slow"] == {0: pytest.approx([0.006] * 2), 2: pytest.approx([0.006] * 2)}
    assert times["quick"] == {image: pytest.approx([0.001] * 2) for image in range(3)}
    one_round = [("slow", 0), ("quick", 2), ("quick", 0), ("quick", 0), ("quick", 1), ("slow", 2), ("quick", 1),
                 ("quick", 2)]  # fmt: skip
    assert order[-16:] == one_round * 2
    assert [one for one in order if one[0] == "slow"] == [("slow", 0), ("slow", 2)] * 3
    assert len(time_over_images(calls, rounds=9, budget=0.0)["quick"][0]) == 5, "fewer are no median"


def test_figures_over_images(clock):
    """An image's ratio is its own: the slow image of the library does not stand against the quick one of the peer."""

    def contestant_of(name, *seconds):
        return Contestant(name, lambda: [clock(value) for value in seconds])

    def verify(results):
        assert results == [0.002, 0.004], results

    others = [contestant_of("peer", 0.008, 0.008)]
    given = Question("q", "t", contestant_of("ernet_fast", 0.002, 0.004), others, verify, same_list, threads=1)
    first, second = ask(given, 60, nothing).figures
    assert first["images"] == second["images"] == 2 and first["repeats"] == 25
    assert first["p50_ms"] == pytest.approx(3) and first["max_ms"] == pytest.approx(4)
    assert first["p99_ms"] == pytest.approx(3.98) and first["items_per_second"] == pytest.approx(1e3 / 3)
    assert (first["times_slower"], first["least_times_slower"]) == (1, 1)
    assert (second["times_slower"], second["least_times_slower"]) == pytest.approx((3, 2))
    text = answer_text({"title": "t", "threads": 1, "figures": [first, second], "missing": []})
    assert "worst" in text and "at least" in text


def same_list(found, mine):
    return Agreement(len(found) == len(mine), "of one length")


def test_a_slow_contestant_gets_fewer_images(clock):
    calls = {image: clock(0.01) for image in range(9)}
    assert list(question._affordable(calls, 0.0, nothing)) == [0, 3, 5, 8]
    assert list(question._affordable(calls, 60.0, nothing)) == list(range(9))
    assert list(question._affordable({0: nothing}, 0.0, nothing)) == [0]


@pytest.fixture
def folder(tmp_path):
    """Two images with tissue, one without, one too small, a hidden one and no image."""
    pil = pytest.importorskip("PIL.Image")
    (tmp_path / "below").mkdir()
    left, right = tissue(2, 64, 64)
    images = {"a.png": np.concatenate([left, right], axis=1), "below/b.jpg": left, "white.png": left * 0 + 250}
    images |= {"small.png": left[:30], ".hidden.png": left}
    for name, image in images.items():
        pil.fromarray(image).save(tmp_path / name)
    (tmp_path / "damaged.png").write_bytes(b"nothing")
    return tmp_path


def test_images_of_the_users_own(folder, monkeypatch):
    found = UsersImages(folder).of_size(60, 60, 9)
    assert len(found) == 3 and all(image.shape == (60, 60, 3) for image in found), "the crops do not overlap"
    assert len({image.tobytes() for image in found}) >= 2 and len(UsersImages(folder).of_size(60, 60, 2)) == 2
    monkeypatch.setattr(stain_questions, "COUNTS", {(60, 60): 2, (100, 100): 2})
    (made,) = stain_questions.stain_questions(CPU, str(folder))
    asked_of = made()
    assert asked_of.title.startswith("Macenko, 2 of your images of 60 x 60")
    asked_of.verify([call() for call in asked_of.own.prepare()])


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none of 0 PNG, JPEG and TIFF files"):
        stain_questions.stain_questions(CPU, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        UsersImages(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        UsersImages(tmp_path / "file")


def test_generated_images_differ():
    found = tissue(9, 48, 48)
    assert len({image.tobytes() for image in found}) == 9


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
    monkeypatch.setattr(stain_questions, "COUNTS", {(224, 224): 2, (460, 700): 1})
    found = run.run_benchmark(BenchmarkConfig(seconds=60, device="cpu", compiled=False), Reporter(quiet=True))
    assert [name for name, _ in names] == [
        "macenko-224",
        "macenko-batch",
        "macenko-700x460",
        "er-shortcut",
        "er-resnet50",
    ]
    assert sum(seconds for _, seconds in names) == pytest.approx(60) and len(found["answers"]) == 5
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seconds": 0}, "seconds=0"),
        ({"seconds": float("nan")}, "seconds=nan"),
        ({"only": "x"}, "only='x'"),
        ({"only": "er", "images": "f"}, "images='f'"),
    ],
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
