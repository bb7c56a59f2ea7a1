"""`python3 dev.py gpu`, all that can be shown without a GPU: cases that fail, hang, crash; steps; time; the table."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import agreement_gpu
import gpu_check
import gpu_runner
import gpu_steps
import pytest
from agreement import Error, levels, require
from gpu_case import Ceilings, cases_of, modules
from gpu_check import Check, parse
from gpu_runner import Deadline, Runner, Task
from gpu_steps import GpuDevice, marked_tests
from gpu_table import final_table
from green import environment_of
from record import Row, read
from tissue import tissue

BENCH = Path(__file__).resolve().parents[2] / "bench"
CEILINGS = Ceilings(4000.0, float("nan"))
PLANTED = """
import os, signal, sys, time
from gpu_case import GpuCase
from record import Row

def good(ceilings):
    print("libraries may print")
    floor = 1e3 / ceilings.copy_gigabytes_per_second
    return Row("bench_planted_gpu", "good", "planted", {"n": 1}, 1, 2, 3, "ms", 5,
               {"copy_time": floor, "pid": os.getpid()})

def raises(ceilings):
    raise ValueError("differs from the reference")

def device_breaks(ceilings):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def dies(ceilings):
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

def hangs(ceilings):
    time.sleep(600)

def gpu_cases():
    targets = ["share_of_copy >= 0.1", "share_of_copy >= 0.9"]
    return [
        GpuCase("later", good, importance=2, seconds=0.1),
        GpuCase("good", good, importance=0, seconds=0.1, smoke=True, title="a good one", targets=targets),
        GpuCase("raises", raises, seconds=0.1, targets=["ratio >= 2"]),
        GpuCase("device breaks", device_breaks, seconds=0.1),
        GpuCase("dies", dies, seconds=0.1),
        GpuCase("hangs", hangs, seconds=0.1, kernel="one"),
        GpuCase("of the same kernel", good, importance=2, seconds=0.1, kernel="one"),
        GpuCase("too long", good, seconds=1e4, targets=["ratio >= 3"]),
    ]
"""
CEILING = """
from gpu_case import GpuCase
from record import Row

def copy(ceilings):
    return Row("ceilings_gpu", "copy bandwidth", "ceilings", {}, 3990, 4000, 4010, "GB/s", 5)

def gpu_cases():
    return [GpuCase("copy bandwidth", copy, seconds=0.1, smoke=True)]
"""
MACHINE = {
    "kind": "gpu-simulated", "name": "Planted GPU", "packages": {"torch": "2.13.0"}, "commit": "012345678",
    "dirty": False, "sources": "feedbeef", "time": "2026-11-23T12:00:00+00:00", "clocks": [],
}  # fmt: skip


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A machine at work takes longer to start Python."""
    monkeypatch.setattr(gpu_runner, "START_SECONDS", 300.0)


@pytest.fixture
def folder(tmp_path):
    cases = tmp_path / "cases"
    cases.mkdir()
    (cases / "bench_planted_gpu.py").write_text(PLANTED)
    (cases / "ceilings_gpu.py").write_text(CEILING)
    (cases / "agreement_gpu.py").write_text("def gpu_cases():\n    return []\n")
    return cases


@pytest.fixture
def runner(folder, tmp_path):
    made = Runner(folder, tmp_path / "cases.log", Deadline(120), patience=5.0)
    yield made
    made.close()


def tasks(folder):
    return {case.name: Task("bench_planted_gpu", case) for case in cases_of("bench_planted_gpu", folder)}


def test_a_case_gets_its_bars(folder, runner):
    (row,) = runner.run(tasks(folder)["good"], CEILINGS)
    assert row.extra_info["share_of_copy"] == 0.125 and row.extra_info["title"] == "a good one"
    assert [(str(target), value) for target, value in row.targets()] == [
        ("share_of_copy >= 0.1", 0.125), ("share_of_copy >= 0.9", 0.125),
    ]  # fmt: skip


def test_cases_that_fail_do_not_stop_the_others(folder, runner):
    given = tasks(folder)
    first = runner.run(given["good"], CEILINGS)[0].extra_info["pid"]
    found = {name: runner.run(given[name], CEILINGS)[0] for name in ("raises", "good")}
    assert found["raises"].status == "FAIL" and "differs from the reference" in found["raises"].extra_info["detail"]
    assert found["good"].extra_info["pid"] == first, "an ordinary error needs no new process"
    for name, words in (
        ("device breaks", "illegal memory access"),
        ("dies", "signal 9: libraries may print | libraries may print | last words"),
    ):
        row = runner.run(given[name], CEILINGS)[0]
        assert row.status == "FAIL" and words in row.extra_info["detail"]
        again = runner.run(given["good"], CEILINGS)[0]
        assert again.status == "measured" and again.extra_info["pid"] != first
        first = again.extra_info["pid"]


@pytest.mark.slow
def test_a_case_that_hangs_is_stopped(folder, runner):
    given = tasks(folder)
    runner.run(given["good"], CEILINGS)
    start = time.monotonic()
    row = runner.run(given["hangs"], CEILINGS)[0]
    assert row.status == "FAIL" and "stopped after 5 s" in row.extra_info["detail"]
    assert time.monotonic() - start < 30
    assert runner.run(given["good"], CEILINGS)[0].status == "measured"
    (later,) = runner.run(given["of the same kernel"], CEILINGS)
    assert later.status == "skipped" and later.extra_info["detail"] == "one hung in hangs"


def test_cases_can_have_processes_of_their_own(folder, runner):
    case = tasks(folder)["good"]
    pids = {runner.run(case, CEILINGS, alone=True)[0].extra_info["pid"] for _ in range(2)}
    assert len(pids) == 2


def target(folder, *build):
    tests = {"stain": ["tests/simt/no_such.py"], "er": []}
    return GpuDevice(MACHINE, folder, list(build) or [sys.executable, "-c", "print('built')"], tests)


def check(folder, tmp_path, *arguments, build=()):
    options = parse(["--results", str(tmp_path / "results"), "--out", str(tmp_path / "out"), *arguments])
    options.logs = tmp_path / "logs"
    made = Check(target(folder, *build), options)
    made.runner.patience = 1.0
    return made


@pytest.mark.slow
def test_the_whole_flow(folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(gpu_check, "STEPS", dict.fromkeys(gpu_check.STEPS, 600.0))  # a machine at work takes longer
    made = check(folder, tmp_path, "--minutes", "60")
    made.run(None)
    assert made.finish() == 1
    machine, rows = read(made.record.path)
    status = {row.name: row.status for row in rows}
    assert status == {
        "build": "pass", "binary built elsewhere": "skipped", "copy bandwidth": "measured",
        "tests.simt.no_such": "FAIL", "compute-sanitizer memcheck": "skipped", "compute-sanitizer racecheck": "skipped",
        "compute-sanitizer initcheck": "skipped", "good": "measured", "raises": "FAIL", "device breaks": "FAIL",
        "dies": "FAIL", "hangs": "FAIL", "too long": "no time left",
        "of the same kernel": "skipped",
    }  # fmt: skip
    assert rows[-1].name == "of the same kernel"
    assert machine["name"] == "Planted GPU" and made.record.path.name == "Planted-GPU-20261123-012345678.json"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [made.record.path.name, "table.txt"]
    assert (tmp_path / "out" / made.record.path.name).read_text() == made.record.path.read_text()
    shown = capfd.readouterr().out
    table = shown[shown.index("record:") :]
    lines = table.splitlines()
    assert lines[-4:] == [
        "1 of 4 targets met", "correctness checks fail: the documents will not report these speeds", "",
        "what failed or had no time, again: python3 dev.py gpu --steps stain-tests,rest",
    ]  # fmt: skip
    assert [line.split()[-1] for line in lines if "share_of_copy" in line] == ["met", "MISSED"]
    assert any("ratio >= 2" in line and line.endswith("FAIL") for line in lines)
    assert any("ratio >= 3" in line and line.endswith("no time left") for line in lines)
    assert len(table) < 6000


def test_the_copy_may_lie_beside_the_record(folder, tmp_path):
    made = check(folder, tmp_path, "--minutes", "2", "--out", str(tmp_path / "results"))
    made.run(None)
    assert made.finish() == 0
    kept = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert kept == [made.record.path.name, "table.txt"] and made.rows[-1].name == "good"


def test_a_record_that_cannot_be_written_does_not_stop_the_run(folder, tmp_path, capfd):
    made = check(folder, tmp_path, "--minutes", "2", "--results", str(tmp_path / "file"))
    (tmp_path / "file").write_text("no folder")
    made.run(None)
    assert made.finish() == 0 and made.rows[-1].name == "good"
    shown = capfd.readouterr().out
    assert "not written: " in shown and "of 2 targets met" in shown


def test_the_smoke_level_runs_one_case_an_operator(folder, tmp_path):
    made = check(folder, tmp_path, "--minutes", "2")
    made.run(None)
    assert made.finish() == 0
    assert [row.name for row in made.rows] == ["build", "binary built elsewhere", "copy bandwidth", "good"]


def test_a_build_that_fails_is_recorded_and_the_rest_runs(folder, tmp_path):
    made = check(folder, tmp_path, "--minutes", "2", build=(sys.executable, "-c", "raise SystemExit('no nvcc here')"))
    made.run(None)
    assert made.finish() == 1
    assert made.rows[0].status == "FAIL" and "no nvcc here" in made.rows[0].extra_info["detail"]
    assert made.rows[-1].name == "good" and made.rows[-1].status == "measured"


def test_modules_that_cannot_be_read_are_recorded(folder, tmp_path):
    (folder / "bench_broken_gpu.py").write_text("def gpu_cases():\n    raise ImportError('no such peer')\n")
    made = check(folder, tmp_path, "--minutes", "2")
    made.run(None)
    made.finish()
    assert any(row.name == "bench_broken_gpu" and "no such peer" in row.extra_info["detail"] for row in made.rows)
    assert made.rows[-1].name == "good"


KILLED = """
import sys, signal, os
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from pathlib import Path
import test_gpu_flow as flow
folder, tmp = Path(sys.argv[3]), Path(sys.argv[4])
made = flow.check(folder, tmp, "--minutes", "2")
add = made.add
def add_and_die(rows):
    add(rows)
    if made.rows[-1].name == "good":
        os.kill(os.getpid(), signal.SIGKILL)
made.add = add_and_die
made.run(None)
"""


def test_a_run_that_is_killed_keeps_every_row(folder, tmp_path):
    command = [sys.executable, "-c", KILLED, str(BENCH), str(Path(__file__).parent), str(folder), str(tmp_path)]
    assert subprocess.run(command, timeout=100, check=False).returncode == -signal.SIGKILL
    for kept in ("results", "out"):
        (path,) = (tmp_path / kept).iterdir()
        names = [row["name"] for row in json.loads(path.read_text())["rows"]]
        assert names == ["build", "binary built elsewhere", "copy bandwidth", "good"]


def test_no_case_needs_a_device_to_be_listed():
    """The reports list the cases, and what they predict, where there is no GPU."""
    for module in ("agreement_gpu", "ceilings_gpu", *modules()):
        given = cases_of(module)
        assert given and len({case.name for case in given}) == len(given), module


@pytest.mark.parametrize("name", agreement_gpu.CHECKS)
def test_the_agreement_checks_hold_for_the_cpu_itself(name):
    assert agreement_gpu.run(name, CEILINGS, device="cpu").status == "pass"


def test_a_check_needs_none_of_the_others():
    """One that breaks the device costs the worker, and the next begins in a new process."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from agreement_gpu import run; run(sys.argv[2], None, 'cpu')"
    )
    for name in ("macenko_fits", "channel_moments"):
        done = subprocess.run(
            [sys.executable, "-c", program, str(BENCH), name], cwd=BENCH.parent, env=environment_of(BENCH.parent),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_the_agreement_checks_see_a_wrong_result():
    with pytest.raises(AssertionError, match="at most"):
        require([Error("x", float("nan"), 1.0)])
    images = tissue(1, 8, 8)
    with pytest.raises(AssertionError, match="grey levels"):
        require(levels("x", images.int() + 2, images))


@pytest.mark.parametrize(
    ("code", "text", "status", "words"),
    [
        (0, "ok a\nok b\n========= ERROR SUMMARY: 0 errors\n", "pass", "2 kernels"),
        (9, "========= Invalid read of size 4\n========= ERROR SUMMARY: 3 errors\n", "FAIL", "3 errors, first: Inv"),
        (1, "========= Error: Device not supported\n", "skipped", "does not work on this machine"),
        (gpu_steps.TIMED_OUT, "ok a\n", "no time left", "1 kernels before"),
        (1, "FAIL a: AssertionError\n========= ERROR SUMMARY: 0 errors\n", "FAIL", ""),
    ],
)  # fmt: skip
def test_what_the_sanitizer_says(code, text, status, words):
    found, detail = gpu_steps.sanitizer_verdict(code, text)
    assert found == status and words in detail


def test_sanitizers_run_every_agreement_case(folder, tmp_path):
    fake = tmp_path / "sanitizer"
    fake.write_text('#!/bin/sh\nwhile [ "$1" != \'--error-exitcode\' ]; do shift; done; shift 2\n"$@"\n')
    fake.chmod(0o755)
    (folder / "agreement_gpu.py").write_text(CEILING.replace("copy bandwidth", "a kernel"))
    with_tool = GpuDevice(MACHINE, folder, [], [], sanitizer=str(fake))
    row = gpu_steps.sanitizer(with_tool, "memcheck", tmp_path, 60)
    assert (row.status, row.extra_info["detail"]) == ("pass", "1 kernels, nothing found")


def test_without_pytest_it_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_steps.importlib.util, "find_spec", lambda name: None)
    (row,) = gpu_steps.tests(target(folder), "stain", tmp_path, Deadline(10))
    assert (row.status, row.extra_info["detail"]) == ("skipped", "pytest is not installed for this interpreter")


SLOW_TESTS = """
import time
import pytest
def test_good():
    pass
@pytest.mark.parametrize("n", [1, 2])
def test_bad(n):
    assert n == 1, "two is not one"
def test_last():
    time.sleep(100)
"""


def test_tests_that_are_cut_off_keep_their_outcomes(folder, tmp_path, monkeypatch):
    (tmp_path / "test_slow.py").write_text(SLOW_TESTS)
    with_tests = GpuDevice(MACHINE, folder, [], {"stain": [str(tmp_path / "test_slow.py")]})
    monkeypatch.setattr(gpu_steps, "cores", lambda: 1)
    for limit in (6, 60):  # a machine at work may need longer to begin
        found = gpu_steps.tests(with_tests, "stain", tmp_path, Deadline(limit))
        rows = {row.name.rpartition(".")[2]: row for row in found}
        if "test_bad" in rows:
            break
    assert rows["test_slow"].status == "no time left"
    detail = rows["test_slow"].extra_info["detail"]
    assert f"stopped after {limit} s; during " in detail and "test_slow.py::test_last" in detail
    assert rows["test_good"].status == "pass"
    assert rows["test_bad"].status == "FAIL"
    assert rows["test_bad"].extra_info["detail"].startswith("1 passed, 1 failure: AssertionError: two is not one")


def test_a_file_that_breaks_costs_itself_alone(folder, tmp_path):
    texts = {
        "test_broken": "import no_such_module",
        "test_crash": "import os\ndef test_a(): pass\ndef test_b(): os.kill(os.getpid(), 9)\ndef test_c(): pass",
        "test_fine": "import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip('no device')",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    files = [str(tmp_path / f"{name}.py") for name in texts]
    rows = list(gpu_steps.tests(GpuDevice(MACHINE, folder, [], {"er": files}), "er", tmp_path, Deadline(100)))
    found = {row.name: (row.status, row.extra_info["detail"]) for row in rows}
    crash = found.pop("test_crash")
    assert crash[0] == "FAIL" and "exit code -9" in crash[1] and "test_crash.py::test_b" in crash[1]
    broken = [row for row in rows if row.name == "test_broken"]
    assert {row.status for row in broken} == {"FAIL"} and any("no_such_module" in found_in(row) for row in broken)
    assert found["test_crash.test_a"] == ("pass", "1 passed")
    assert found["test_fine.test_a"] == ("pass", "1 passed")
    assert found["test_fine.test_b"] == ("skipped", "1 skipped: Skipped: no device")
    assert "test_crash.test_c" not in found


def found_in(row):
    return row.extra_info["detail"]


class SimulatedClock:
    """Seconds that pass only where something waits; what runs at the same time begins at the same time."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def call(self, command, log, seconds, **environment):
        """A program that runs to its limit."""
        log.write_text("")
        self.now += seconds
        return gpu_steps.TIMED_OUT

    def worker(clock):
        class Hanging:
            """Ready in the last moment, and without an answer to any case."""

            def __init__(self, folder, log):
                pass

            def answer(self, limit, request=None):
                clock.now += limit
                return True if request is None else None

            def exit_code(self):
                return None

            def close(self):
                pass

        return Hanging

    def pool(clock):
        class Pool:
            def __init__(self, *_):
                self.start = self.end = clock.now

            def __enter__(self):
                return self

            def submit(self, function, *arguments):
                clock.now, future = self.start, Future()
                future.set_result(function(*arguments))
                self.end = max(self.end, clock.now)
                return future

            def __exit__(self, *_):
                clock.now = self.end

        return Pool


def test_a_run_with_every_step_at_its_limit_ends_in_time(tmp_path, monkeypatch, capsys):
    """The real cases and test files, each program stopped at its limit: eight minutes, and time for every step."""
    clock = SimulatedClock()
    monkeypatch.setattr(gpu_runner, "Worker", clock.worker())
    monkeypatch.setattr(gpu_steps, "call", clock.call)
    for module in (gpu_check, gpu_steps):
        monkeypatch.setattr(module, "ThreadPoolExecutor", clock.pool())
    device = GpuDevice(MACHINE, BENCH, ["build"], marked_tests(), sanitizer="sanitizer")
    options = parse(["--results", str(tmp_path / "results"), "--out", str(tmp_path / "out")])
    binary = tmp_path / "binary.so"
    binary.write_text("")
    made = Check(device, options, clock)
    made.run(binary)
    assert clock.now <= 480 - gpu_check.LAST_SECONDS
    started = re.findall(r"-- (\S+), (\d+) s left", capsys.readouterr().out)
    assert [name for name, _ in started] == [*gpu_check.STEPS]
    assert all(int(left) >= 20 for _, left in started)
    assert list(made.again) == [*gpu_check.STEPS] and (tmp_path / "out" / "logs").is_dir()


def test_what_runs_is_ended_with_the_run(tmp_path):
    command = ["sh", "-c", "sleep 100 & wait"]
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(gpu_steps.call, command, tmp_path / "log", 90)
        while not gpu_steps._RUNNING:
            time.sleep(0.01)
        gpu_steps.stop_all()
        assert waiting.result(timeout=30) == -signal.SIGKILL


def test_only_files_with_gpu_tests_are_collected():
    """The others may import what is not installed beside a device's torch."""
    groups = marked_tests()
    named = {group: {Path(path).name for path in files} for group, files in groups.items()}
    assert "test_triton_gpu.py" in named["er"] and "test_macenko_gpu.py" in named["stain"]
    assert "test_stain_inputs.py" not in named["stain"]
    for path in (*groups["er"], *groups["stain"]):
        assert "hypothesis" not in Path(path).read_text()


def test_what_is_simulated_lands_in_no_record_of_a_gpu():
    assert parse(["--simulate"]).results.name == "simulated" and parse([]).results.name == "results"


def test_a_step_that_takes_too_long_is_stopped(tmp_path):
    log = tmp_path / "log"
    code = gpu_steps.call([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(99)"], log, 1)
    assert code == gpu_steps.TIMED_OUT and "stopped after 1 s: begun" in gpu_steps.why(code, log, 1)


def test_the_table_stays_short():
    many = [
        Row("tests", f"t{i}", "tests", {}, 0, 0, 0, "", 1, {"status": "FAIL", "detail": "x" * 500}) for i in range(99)
    ]
    text = final_table(MACHINE, many)
    assert "... and 79 more" in text and len(text) < 6000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "0"], "expected a positive number"),
        (["--minutes", "-1"], "expected a positive number"),
        (["--binary", "/no/such/file"], "no such file"),
        (["--crops", "/no/such/file"], "no such file"),
        (["--wheels", "/no/such/folder"], "no *.whl in it"),
        (["--steps", "build,speed"], "no step speed; there are build, agreement"),
    ],
)
def test_wrong_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_wheels_are_imported_as_they_are(tmp_path):
    from gpu_check import importable_wheels

    with zipfile.ZipFile(tmp_path / "planted_peer-1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("planted_peer/__init__.py", "answer = 42")
        wheel.writestr(
            "planted_peer-1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: planted-peer\nVersion: 1.2\n"
        )
    program = (
        "import planted_peer as p; from importlib import metadata as m; print(p.answer, m.version('planted-peer'))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(importable_wheels(tmp_path))}
    assert subprocess.check_output([sys.executable, "-c", program], env=environment, text=True).split() == ["42", "1.2"]
    (tmp_path / "other-1-cp311-cp311-linux_x86_64.whl").touch()
    with pytest.raises(ValueError, match="other-1-cp311.* holds compiled code"):
        importable_wheels(tmp_path)


def test_crops_travel_in_a_file(tmp_path, monkeypatch):
    import crops

    monkeypatch.setenv("ERNET_TEST_DATA", str(tmp_path / "none"))
    assert crops.save(tmp_path / "crops.npz", 2) == "2 generated"
    assert crops.given_crops() is None
    monkeypatch.setenv("ERNET_CROPS", str(tmp_path / "crops.npz"))
    images, origin = crops.given_crops()
    assert images.shape == (2, 3, 224, 224) and origin == "2 generated" and not images[0].equal(images[1])


def test_the_commit_can_be_given_where_there_is_no_git(tmp_path, monkeypatch):
    from machine import commit_of

    monkeypatch.setenv("ERNET_COMMIT", "0123456789abcdef")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", os.fspath(tmp_path.parent))
    assert commit_of(tmp_path) == ("012345678", False)
