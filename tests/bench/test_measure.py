"""`python3 dev.py bench`: no speed of a broken tree, honest comparisons, and the history."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import compare
import green
import history
import measure
import progress
import pytest
from record import Record, Row, read

ROOT = Path(__file__).resolve().parents[2]


def row(name, p50, unit="ms", **info):
    return Row("bench_x", name, "g", {}, p50, p50, p50, unit, 5, info)


def rounds(*values, unit="ms"):
    return [{("bench_x", "a"): row("a", value, unit)} for value in values]


def test_ratios_are_taken_within_each_round():
    (change,) = compare.changes(rounds(2.0, 20.0, 4.0), rounds(1.0, 10.0, 1.0))
    assert change.ratios == [2.0, 2.0, 4.0] and change.ratio == 2.0 and (change.before, change.now) == (4.0, 1.0)
    (rate,) = compare.changes(rounds(10.0, unit="GB/s"), rounds(20.0, unit="GB/s"))
    assert rate.ratio == 2.0


@pytest.mark.parametrize(
    ("before", "now", "regressed"),
    [
        ((1.0, 1.0, 1.0), (1.1, 1.1, 1.1), True),
        ((1.0, 1.0, 1.0), (1.04, 1.04, 1.04), False),  # below the share
        ((1.0, 1.0, 1.0), (1.2, 1.2, 0.9), False),  # not in every round: noise
        ((1.0, 1.0, 1.0), (0.5, 0.5, 0.5), False),
    ],
)
def test_what_counts_as_a_regression(before, now, regressed):
    (change,) = compare.changes(rounds(*before), rounds(*now))
    assert change.regressed(0.05) is regressed
    assert ("REGRESSED" in compare.table([change], "abc", 0.05)) is regressed


def test_rows_that_only_one_side_has_are_not_compared():
    before, now = rounds(1.0), [{("bench_x", "a"): row("a", 1.0), ("bench_x", "b"): row("b", 1.0)}]
    assert [change.row.name for change in compare.changes(before, now)] == ["a"]


@pytest.fixture
def two_trees(tmp_path, monkeypatch):
    """compare() with both sides measured by a table, in the order asked for."""
    asked = []

    def run_benches(root, folder, selection, log=None):
        asked.append(root.name)
        machine = {"kind": "cpu", "name": "x", "time": "2026-11-23T12:00:00", "commit": root.name, "dirty": False}
        Record.of(machine, folder).add(row("a", 1.0 if root.name == "old" else 1.2))
        return 0

    monkeypatch.setattr(compare, "worktree", lambda revision: contextlib.nullcontext(tmp_path / "old"))
    monkeypatch.setattr(compare, "require_green", lambda root: None)
    monkeypatch.setattr(compare, "run_benches", run_benches)
    return asked


def test_the_two_take_turns_and_a_regression_is_an_exit_code(two_trees, capsys):
    assert measure.main(["--compare", "abc", "--rounds", "2", "--fail-above", "5%"]) == 1
    assert two_trees == ["old", ROOT.name, "old", ROOT.name]
    assert "REGRESSED" in capsys.readouterr().out
    assert measure.main(["--compare", "abc", "--rounds", "1", "--fail-above", "25"]) == 0
    assert measure.main(["--compare", "abc", "--rounds", "1"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fail-above", "5%"], "--fail-above needs --compare"),
        (["--compare", "x", "--fail-above", "much"], "expected a percentage"),
        (["--compare", "x", "--rounds", "0"], "expected 1 or more"),
    ],
)
def test_wrong_usage(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        measure.main(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_an_unknown_revision_is_named(capsys):
    assert measure.main(["--compare", "no-such-revision"]) == 2
    assert "no-such-revision: no such revision" in capsys.readouterr().err


def tree(folder, content):
    (folder / "tests" / "er").mkdir(parents=True)
    (folder / "tests" / "er" / "test_operators.py").write_text(content)
    return folder


def test_the_speed_of_a_tree_that_fails_its_tests_is_not_reported(tmp_path):
    root = tree(tmp_path, "def test_sum():\n    assert 1 + 1 == 3\n")
    with pytest.raises(green.NotReported, match="(?s)assert .*not reported: the correctness tests of .* fail"):
        green.require_green(root)
    assert not green.stamp_of(root).exists()


def test_tests_that_passed_are_not_run_again_until_the_sources_change(tmp_path):
    ran = tmp_path / "ran"
    root = tree(tmp_path / "tree", f"def test_sum():\n    open({str(ran)!r}, 'a').write('x')\n")
    green.require_green(root)
    green.require_green(root)
    assert ran.read_text() == "x"
    (root / "setup.py").write_text("# changed\n")
    green.require_green(root)
    assert ran.read_text() == "xx"


def test_a_tree_without_the_tests_is_not_reported(tmp_path):
    with pytest.raises(green.NotReported, match="has none of the tests"):
        green.require_green(tmp_path)


def test_the_tests_that_are_required_exist():
    assert all((ROOT / test).exists() for test in green.QUICK)


def test_nothing_is_measured_on_red_tests(monkeypatch, capsys):
    def red() -> None:
        raise green.NotReported("not reported: red")

    monkeypatch.setattr(measure, "require_green", red)
    monkeypatch.setattr(measure, "run_benches", lambda *arguments: pytest.fail("it was measured"))
    assert measure.main([]) == 1
    assert "not reported: red" in capsys.readouterr().err


def test_names_choose_benches(monkeypatch):
    given = []
    monkeypatch.setattr(measure, "require_green", lambda: None)
    monkeypatch.setattr(measure, "run_benches", lambda *arguments: given.append(arguments) or 0)
    assert measure.main(["macenko", "stage", "-k", "fit", "--slow", "--durations=3"]) == 0
    chosen = ["--name", "macenko", "--name", "stage", "-k", "fit", "--slow"]
    assert given[0][2] == [*chosen, "--progress", str(measure.PROGRESS), "--durations=3"]
    assert measure.main(["--resume"]) == 0
    assert given[1][2] == ["--progress", str(measure.PROGRESS), "--resume", "--minutes", "11.50"]


@pytest.fixture
def results(tmp_path):
    for day, (fast, rate) in enumerate([(4.0, 100), (2.0, 150)], 1):
        machine = {
            "kind": "cpu", "name": "cpu-2-cores", "time": f"2026-11-0{day}T12:00:00", "commit": f"{day}" * 9,
            "dirty": False, "sources": "", "clocks": [],
        }  # fmt: skip
        Record.of(machine, tmp_path).add(row("fit", fast, target="p50 <= 3"), row("rate", rate, "GB/s"))
    return tmp_path


def test_history(results, tmp_path, capsys):
    picture = tmp_path / "out" / "history.png"
    assert history.history(["fit", "rate"], picture, results) == 0
    shown = capsys.readouterr().out
    assert "4 ms (111111111)" in shown and "2.00 (222222222)" in shown and "1.50 (222222222)" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(history.series([], results)) == ["cpu-2-cores: fit"], "without names: rows with a target"
    assert history.history(["nothing"], picture, results) == 1


def test_history_without_matplotlib(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(history.importlib.util, "find_spec", lambda name: None)
    assert history.history([], tmp_path / "history.png", results) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out and not (tmp_path / "history.png").exists()


def test_benches_of_this_tree_run_on_the_package_of_another(tmp_path):
    """An empty package is found in place of this one, and benches that it cannot serve do not stop the others."""
    (tmp_path / "ernet_fast").mkdir()
    (tmp_path / "ernet_fast" / "__init__.py").write_text("")
    log = tmp_path / "log"
    compare.run_benches(tmp_path, tmp_path / "rows", ["--name", "no such bench"], log)
    assert "No module named 'ernet_fast.stain'" in log.read_text() and "Interrupted" not in log.read_text()


SOME_BENCHES = """
import os, pytest, time
def test_first(record_row):
    record_row("g", 1, 2, 3, "ms", 5)
def test_means(record, record_row):
    rows = record.rows() if record else []
    if rows:
        record_row("g", 1, 1, len(rows), "ms", 5)
@pytest.mark.parametrize("layout", ["contiguous"])
def test_least(record_row, layout):
    record_row("g", 1, 2, 3, "ms", 5)
def test_second(record_row):
    if os.environ.get("FAILS"):
        raise ValueError("broken")
    record_row("g", 1, 2, 3, "ms", 5)
"""


@pytest.fixture
def some_benches(tmp_path, monkeypatch):
    """A run of two benches of a folder of their own: run(*arguments) gives the names of the rows it wrote."""
    folder = tmp_path / "bench"
    folder.mkdir()
    (folder / "bench_x.py").write_text(SOME_BENCHES)
    (folder / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'bench')!r})\nfrom importlib import util\n"
        f"spec = util.spec_from_file_location('benches', {str(ROOT / 'bench' / 'conftest.py')!r})\n"
        "module = util.module_from_spec(spec)\nspec.loader.exec_module(module)\nglobals().update(vars(module))\n"
    )
    results = tmp_path / "results"

    def run(*arguments, **environment):
        command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder)]
        command += ["-o", compare.ADDOPTS, "-p", "no:cacheprovider", str(folder), "--record", str(results)]
        command += ["--progress", str(tmp_path / "progress.txt"), *arguments]
        env = {**green.environment_of(ROOT), **environment}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        return done.stdout, [one.name for path in results.glob("*.json") for one in read(path)[1]]

    return run


@pytest.mark.slow
def test_a_run_goes_on_where_an_earlier_one_ended(some_benches):
    said, rows = some_benches(FAILS="1")
    assert "1 failed, 3 passed" in said and rows == ["first", "least[contiguous]", "means"]
    said, rows = some_benches("--resume")
    assert "2 passed, 2 deselected" in said and rows == ["first", "least[contiguous]", "means", "second"]
    said, _ = some_benches("--resume")
    assert "1 passed, 3 deselected" in said, "means are computed of what there is by now"
    said, rows = some_benches()
    assert "4 passed" in said, "without --resume everything is measured again"


def test_the_targets_come_first_and_means_last(some_benches):
    assert some_benches()[1] == ["first", "second", "least[contiguous]", "means"]


@pytest.mark.slow
def test_nothing_begins_once_the_time_is_up(some_benches):
    said, rows = some_benches("--minutes", "0")
    assert "3 skipped" in said and "no time left" in said and rows == []
    said, rows = some_benches("--resume", "--minutes", "5")
    assert "4 passed" in said and rows == ["first", "second", "least[contiguous]", "means"]


def test_the_benches_behind_the_bars_come_first():
    names = sorted(path.stem for path in (ROOT / "bench").glob("bench_*.py") if not path.stem.endswith("_gpu"))
    assert sorted(progress.ORDER) == names
    places = {name: place for place, name in enumerate(progress.ORDER)}
    assert places["bench_macenko"] < places["bench_er_training"] < places["bench_er_operators"]
