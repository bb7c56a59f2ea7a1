"""Several processes under torchrun train one network, as one process does on the same images a step."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ernet_fast.train import TrainConfig, fit, load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
GLOBAL_BATCH = 8
TINY = {"epochs": 1, "base_channels": 8, "image_size": 32, "optimizer": "sgd", "device": "cpu", "precision": "64-true"}
"""In float64: BatchNorm over eight values, as in the last stage here, makes float32's last bits large within steps."""


def torchrun(folder: Path, processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, "-m", "ernet_fast", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def alone(tiny_breakhis, tmp_path_factory):
    """The state after training in one process."""
    from ernet_fast.train import Reporter

    out = tmp_path_factory.mktemp("alone") / "run"
    fit(
        TrainConfig(data=str(tiny_breakhis), out=str(out), batch_size=GLOBAL_BATCH, **TINY),
        reporter=Reporter(quiet=True),
    )
    return load_checkpoint(out / "last.pt")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_do_what_one_does(tiny_breakhis, tmp_path, alone, processes):
    options = [text for name, value in TINY.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    batch = ["--batch-size", str(GLOBAL_BATCH // processes)]
    torchrun(
        tmp_path, processes, "train", "--data", str(tiny_breakhis), "--out", "run", "--sync-batchnorm", *options, *batch
    )
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["step"] == alone["step"]
    for found, expected in zip(state["history"], alone["history"], strict=True):
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-7)  # the losses are float32
        assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-9)
    for name, tensor in alone["model"].items():
        torch.testing.assert_close(state["model"][name], tensor, rtol=1e-8, atol=1e-9, msg=name)

    with open(tmp_path / "run" / "split.csv", newline="") as file:
        validation = [row["image"] for row in csv.DictReader(file) if row["fold"] == "0"]
    assert state["history"][0]["val"]["images"] == len(validation)
    if processes == 2:
        done = torchrun(tmp_path, 2, "evaluate", "run/last.pt", "--split", "val", "--json")
        found, expected = json.loads(done.stdout)["overall"], dict(state["history"][-1]["val"])
        # the calibration error is a sum of float32 probabilities, in another order
        assert found.pop("ece") == pytest.approx(expected.pop("ece"), rel=1e-6)
        assert found == expected
