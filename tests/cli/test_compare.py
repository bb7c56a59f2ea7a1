"""compare as a command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ernet_fast.data import Sample
from ernet_fast.train import Bootstrap, Predictions, compare


def write_run(folder: Path, seed: int, settings: str) -> Predictions:
    """What `evaluate --out` leaves, of 48 images of 8 patients."""
    scores = torch.rand(48, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    samples = tuple(
        Sample(Path(f"{i}.png"), i // 6 % 2, "A", "s", f"{i // 6}", (40, 100)[i % 2], "1") for i in range(48)
    )
    made = Predictions(torch.stack([1 - scores, scores], dim=1), samples, ("benign", "malignant"))
    folder.mkdir()
    made.write_csv(folder / "predictions.csv")
    (folder / "metrics.json").write_text(f'{{"settings": {settings}}}')
    return made


@pytest.fixture
def runs(tmp_path):
    first = write_run(tmp_path / "a", 1, '{"model": "er_resnet18", "device": "cpu"}')
    second = write_run(tmp_path / "b", 2, '{"model": "er_resnet34", "device": "cuda"}')
    return first, second


def test_json_is_what_compare_finds(call, runs, tmp_path):
    called = call("compare", tmp_path / "a", tmp_path / "b", "--resamples", 500, "--json", "--out", tmp_path / "c.json")
    assert called.code == 0 and called.json["settings"] == {"model": ["er_resnet18", "er_resnet34"]}
    expected = compare(*runs, Bootstrap(500)).to_dict()
    assert {name: called.json[name] for name in expected if name != "settings"} == {
        name: value for name, value in expected.items() if name != "settings"
    }
    assert (tmp_path / "c.json").is_file()


def test_table(call, runs, tmp_path):
    called = call("compare", tmp_path / "a", tmp_path / "b", "--resamples", 500, "--by-magnification")
    assert called.code == 0 and "48 images of 8 patients" in called.out and "\n40X\n" in called.out
    assert "model: er_resnet18, er_resnet34" in called.out and "device" not in called.out


def test_what_is_refused(call, runs, tmp_path):
    missing = call("compare", tmp_path / "a", tmp_path / "none")
    assert missing.code == 2 and "no checkpoint at" in missing.err
    write_run(tmp_path / "c", 3, "{}").subset(lambda sample: sample.patient != "1").write_csv(
        tmp_path / "c/predictions.csv"
    )
    others = call("compare", tmp_path / "a", tmp_path / "c")
    assert others.code == 2 and "6 only in the first" in others.err
