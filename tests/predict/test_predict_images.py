"""Images without labels get the answers that evaluation gives them."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch

from ernet_fast.cli import main
from ernet_fast.data import PatchTransform, parse_name, read_image
from ernet_fast.predict import TrainedNetwork, predict_files
from ernet_fast.stain import ColourCounts, macenko_normalize
from ernet_fast.train import Reporter, evaluate, load_checkpoint
from ernet_fast.train.stain_choice import StainNormalization


@pytest.mark.parametrize("folder", ["run_folder", "reinhard_folder"], ids=["macenko", "reinhard"])
def test_the_answers_are_those_of_evaluation(request, folder, tmp_path):
    run_folder = request.getfixturevalue(folder)
    expected = evaluate(run_folder, split="all", device="cpu", reporter=Reporter(quiet=True)).predictions
    flat = tmp_path / "unlabelled"
    flat.mkdir()
    for number, sample in enumerate(expected.samples):
        shutil.copy(sample.path, flat / f"{number:03d}{sample.path.suffix}")
    done = predict_files(run_folder, [flat], tmp_path / "out", device="cpu", reporter=Reporter(quiet=True))
    assert [entry.kind for entry in done] == ["image"] * len(expected)
    found = torch.tensor([entry.probabilities for entry in done], dtype=torch.float64)
    torch.testing.assert_close(found, expected.probabilities, rtol=0, atol=1e-6)
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["predicted"] for row in rows] == [expected.classes[k] for k in expected.predicted.tolist()]
    assert [float(row["p_malignant"]) for row in rows] == pytest.approx(found[:, 1].tolist(), abs=1e-6)
    record = json.loads((tmp_path / "out" / "predict.json").read_text())
    assert record["epoch"] == 1 and record["classes"] == ["benign", "malignant"] and record["image_size"] == 32
    assert record["stain_target"] and len(record["sha256"]) == 64 and record["slides"] == {}


def test_stains_are_normalised_as_the_checkpoint_says(run_folder, tiny_breakhis):
    trained = TrainedNetwork(run_folder, device="cpu")
    image = read_image(next(tiny_breakhis.rglob("*.png")))
    stain = StainNormalization.from_state(load_checkpoint(run_folder / "best.pt")["stain"])
    normalised = stain(image)
    assert not torch.equal(normalised, image)
    expected = PatchTransform(32)(normalised)
    assert torch.equal(trained.prepare(image), expected)


def test_after_a_training_by_slide_stains_are_those_of_slides(run_folder, tiny_breakhis, tmp_path, monkeypatch):
    samples = [parse_name(path) for path in sorted(tiny_breakhis.rglob("*.png"))]
    slide = [sample.path for sample in samples if sample.slide == samples[0].slide]
    shutil.copy(slide[0], tmp_path / "x.png")
    init = TrainedNetwork.__init__

    def by_slide(self, *arguments, **options):
        init(self, *arguments, **options)
        self.by_slide = True

    monkeypatch.setattr(TrainedNetwork, "__init__", by_slide)
    with pytest.MonkeyPatch.context() as patch:
        warned = []
        patch.setattr(Reporter, "warning", lambda self, text: warned.append(text))
        done = predict_files(run_folder, [*slide, tmp_path / "x.png"], tmp_path / "out", device="cpu")
    assert len(warned) == 1 and "names of 1 images" in warned[0]
    trained, counts = TrainedNetwork(run_folder, device="cpu"), ColourCounts()
    for path in slide:
        counts.add(read_image(path), layout="CHW")
    target = StainNormalization.from_state(trained.state["stain"]).normalizer.target
    by_path = {entry.path: entry.probabilities for entry in done}
    for path in slide:
        pixels = macenko_normalize(read_image(path), target, source=counts.fit(), layout="CHW")
        expected = trained.probabilities([PatchTransform(32)(pixels)])[0].tolist()
        assert by_path[path] == pytest.approx(expected, abs=1e-6)
    own = trained.probabilities([trained.prepare(read_image(slide[0]))])[0].tolist()
    assert by_path[tmp_path / "x.png"] == pytest.approx(own, abs=1e-6)


def test_the_command_lists_what_failed(run_folder, tiny_breakhis, tmp_path, capsys):
    place = tmp_path / "in"
    place.mkdir()
    first = next(tiny_breakhis.rglob("*.png"))
    shutil.copy(first, place / "b.png")
    (place / "a.png").write_bytes(first.read_bytes()[:100])
    (place / "c.bmp").write_bytes(b"BM")
    arguments = ["predict", str(run_folder), str(place), "--out", str(tmp_path / "out"), "--device", "cpu", "--quiet"]
    assert main([*arguments, "--json"]) == 3
    entries = json.loads(capsys.readouterr().out)
    assert [e["reason"] is None for e in entries] == [False, True, False]
    assert sum(entries[1]["probabilities"].values()) == pytest.approx(1)
    assert main(arguments) == 3
    shown = capsys.readouterr().out
    assert "b.png" in shown and "failed" in shown and "1 files" in shown


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--class", "mystery"], "the network knows benign, malignant"),
        (["--batch-size", "0"], "batch_size=0"),
        (["--as", "slides"], "no whole slide"),
    ],
)
def test_wrong_arguments(run_folder, tiny_breakhis, tmp_path, capsys, extra, message):
    image = next(tiny_breakhis.rglob("*.png"))
    assert main(["predict", str(run_folder), str(image), "--out", str(tmp_path / "out"), *extra]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
