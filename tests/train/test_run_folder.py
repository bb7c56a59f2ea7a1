"""One run at a time writes to a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ernet_fast.train import fit
from ernet_fast.train.run_folder import find_checkpoint, only_run

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys
from pathlib import Path
from ernet_fast.train.run_folder import only_run
with only_run(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder `run`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.stdin.close()
    process.wait()
    process.stdout.close()


def test_a_second_run_is_refused_and_named_the_first(tmp_path, holder, make_config, quiet):
    with pytest.raises(RuntimeError, match=rf"another run is writing to .*run'.*process {holder.pid} on .*--out"):
        fit(make_config("run"), reporter=quiet)
    assert os.listdir(tmp_path / "run") == [".lock"]


def test_a_killed_run_holds_nothing(tmp_path, holder):
    holder.kill()
    holder.wait()
    with only_run(tmp_path / "run"):
        pass


def test_two_runs_of_one_process(tmp_path):
    with only_run(tmp_path / "run"), pytest.raises(RuntimeError, match="this process is training into"):
        with only_run(tmp_path / "run"):
            pass
    with only_run(tmp_path / "run"):
        pass


def test_what_killed_runs_left_is_removed_and_the_folder_made(tmp_path):
    folder = tmp_path / "deep" / "run"
    with only_run(folder):
        assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        (folder / "last.pt").write_bytes(b"")
    (folder / f".last.pt.{os.getpid()}.1.tmp").write_bytes(b"half")
    with only_run(folder):
        assert sorted(os.listdir(folder)) == [".lock", "last.pt"]
    with only_run(tmp_path / "unused"):
        pass
    assert not (tmp_path / "unused").exists(), "nothing was written"


def test_a_folder_stands_for_its_best_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no best\.pt in the folder"):
        find_checkpoint(tmp_path)
    (tmp_path / "last.pt").touch()
    with pytest.raises(FileNotFoundError, match="without a complete epoch"):
        find_checkpoint(tmp_path)
    (tmp_path / "best.pt").touch()
    assert find_checkpoint(tmp_path) == tmp_path / "best.pt"
    assert find_checkpoint(tmp_path / "last.pt") == tmp_path / "last.pt"
