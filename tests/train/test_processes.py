"""Two processes under torchrun train one network and validate every image once."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ernet_fast.train import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_torchrun(tiny_breakhis, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "ernet_fast"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*command, *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done

    tiny = "--epochs 1 --base-channels 8 --image-size 32 --batch-size 4 --device cpu".split()
    run("train", "--data", str(tiny_breakhis), "--out", "run", *tiny)
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["step"] == len(state["train_images"]) // 2 // 4
    with open(tmp_path / "run" / "split.csv", newline="") as file:
        validation = [row["image"] for row in csv.DictReader(file) if row["fold"] == "0"]
    assert state["history"][0]["val"]["images"] == len(validation)

    figures = json.loads(run("evaluate", "run/last.pt", "--split", "val", "--json").stdout)
    assert figures["overall"] == state["history"][0]["val"]
