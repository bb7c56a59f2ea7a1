"""ablate as a command: shards, resuming, tables, refusals."""

from __future__ import annotations

import csv
import json

import pytest

TINY = ["--base-channels", 8, "--image-size", 32, "--batch-size", 8, "--device", "cpu", "--epochs", 1,
        "--max-train-images", 16, "--max-val-images", 8]  # fmt: skip
GRID = ["--shortcuts", "er", "--stains", "none", "macenko", "--folds", 0, 1]


def test_a_study_in_shards(call, tiny_breakhis, tmp_path):
    pytest.importorskip("scipy", reason="the range test needs SciPy")
    out = tmp_path / "study"
    # settings of train whose names begin with those that ablate sets
    options = ["--", "--data", tiny_breakhis, *TINY, "--stain-gain", 0.1, "--stain-fit=image"]
    first = call("ablate", "--out", out, *GRID, "--shard", "1/2", "--json", *options)
    assert first.code == 0 and (first.json["finished"], first.json["planned"]) == (2, 4)
    assert "cell 1/2 er_resnet18-none-fold0-seed0" in first.err
    second = call("ablate", "--out", out, *GRID, "--shard", "2/2", *options)
    assert second.code == 0 and "4 of 4 cells finished" in second.out and "preprocessing by accuracy" in second.out
    splits = {
        json.loads((run / "config.json").read_text())["split_file"] for run in (out / "cells").iterdir()
    }  # fmt: skip
    assert splits == {str(out / "split.csv")}
    with open(out / "ablation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["stain"], row["fold"]) for row in rows] == [(s, f) for f in "01" for s in ("none", "macenko")]
    assert len({row["images"] for row in rows}) == 1 and all(0 <= float(row["accuracy"]) <= 1 for row in rows)

    again = call("ablate", "--out", out, *GRID, "--json", *options)
    assert again.code == 0 and "cell" not in again.err
    found = again.json
    assert [t["runs"] for t in found["treatments"]] == [2, 2] and list(found["range_tests"]) == ["preprocessing"]
    accuracies = [float(row["accuracy"]) for row in rows if row["stain"] == "none"]
    assert found["treatments"][0]["mean"]["accuracy"] == pytest.approx(sum(accuracies) / 2)
    assert all(row["epochs"] == "1" and float(row["seconds_per_epoch"]) > 0 for row in rows)
    page = (out / "ablation.html").read_text(encoding="utf-8")
    assert "Table 1" in page and 'src="http' not in page and "<img" in page
    assert (out / "ablation_runs.png").stat().st_size > 1000
    difference = found["intervals"]["differences"]["all"]["accuracy"]["macenko - none, er_resnet18"]
    by_fold = [float(b["accuracy"]) - float(a["accuracy"]) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    assert difference["blocks"] == pytest.approx(by_fold) and set(found["intervals"]["means"]) == {
        "all",
        "100X",
        "200X",
    }
    tables = (out / "ablation.md").read_text(encoding="utf-8")
    assert f"| macenko - none, er_resnet18 | {sum(by_fold) / 2:+.3f} |" in tables and "\n| --- | --- | --:" in tables
    without = call("ablate", "--out", out, *GRID, "--table-only", "--resamples", 0, "--json")
    assert without.code == 0 and without.json["intervals"] is None
    assert "over patients" not in (out / "ablation.md").read_text(encoding="utf-8").split("## Networks")[1]
    assert json.loads((out / "ablation.json").read_text())["planned"] == 4

    cells = [out / "cells" / f"er_resnet18-{stain}-fold0-seed0" / "evaluation" for stain in ("none", "macenko")]
    compared = call("compare", *cells, "--resamples", 100)
    assert compared.code == 0 and "stain: none, macenko" in compared.out

    other = call("ablate", "--out", out, *GRID, *options, "--lr", 0.5)
    assert other.code == 2 and "lr was None, now 0.5" in other.err
    part = call("ablate", "--out", out, "--shortcuts", "er", "--stains", "none", "--table-only")
    assert part.code == 0 and "2 of 5 cells finished" in part.out and "Tukey" not in part.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--"], "--data is missing"),
        (["--", "--data", "d", "--model", "er_resnet18"], "--model behind --"),
        (["--", "--data", "d", "--stain=none"], "--stain=none behind --"),
        (["--", "--data", "d", "--depth", "18"], "does not take the options of cell er_resnet18"),
        (["--folds", 0, 0, "--", "--data", "d"], "folds="),
        (["--shard", "3/2", "--", "--data", "d"], "no BreakHis data"),
        (["--figure", "speed"], "invalid choice"),
    ],
)
def test_what_is_refused(call, tmp_path, arguments, message):
    if message == "no BreakHis data":
        arguments[-1] = tmp_path
    called = call("ablate", "--out", tmp_path / "study", "--shortcuts", "er", *arguments)
    assert called.code == 2 and message in called.err


def test_torchrun_is_refused(call, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    called = call("ablate", "--out", tmp_path / "study", "--", "--data", "d")
    assert called.code == 2 and "--shard I/N, without torchrun" in called.err


def test_nothing_finished_is_said(call, tmp_path):
    called = call("ablate", "--out", tmp_path / "study", "--table-only")
    assert called.code == 1 and "no cell of" in called.err
