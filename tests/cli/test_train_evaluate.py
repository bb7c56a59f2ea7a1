"""train and evaluate as commands."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from ernet_fast.cli import train as train_command
from ernet_fast.data import PatchTransform, parse_name
from ernet_fast.models import load_exported
from ernet_fast.train import TrainConfig, load_checkpoint

TINY = ["--base-channels", 8, "--image-size", 32, "--batch-size", 8, "--device", "cpu", "--seed", 0]


@pytest.fixture(scope="module")
def trained(tiny_breakhis, tmp_path_factory):
    from ernet_fast.train import Reporter, fit

    out = tmp_path_factory.mktemp("runs") / "run"
    config = TrainConfig(
        data=str(tiny_breakhis), out=str(out), base_channels=8, image_size=32, batch_size=8, epochs=1, device="cpu"
    )
    return fit(config, reporter=Reporter(quiet=True))


def test_train_json_stop_and_resume(call, tiny_breakhis, tmp_path):
    out = tmp_path / "run"
    first = call("train", "--data", tiny_breakhis, "--out", out, "--epochs", 2, "--stop-after", 1, *TINY, "--json")
    assert first.code == 0 and first.json["finished"] is False and len(first.json["history"]) == 1
    assert "epoch 1/2" in first.err
    second = call("train", "--out", out, "--resume")  # the settings come from the checkpoint
    assert second.code == 0 and "best epoch" in second.out and "ernet-fast evaluate" in second.out
    assert len(json.loads((out / "history.json").read_text())) == 2
    again = call("train", "--data", tiny_breakhis, "--out", out, *TINY)
    assert again.code == 2 and "already holds a run" in again.err
    other = call("train", "--out", out, "--resume", "--lr", 0.5)
    assert other.code == 2 and "lr was 0.001, now 0.5" in other.err


def test_quiet_is_quiet(call, tiny_breakhis, tmp_path):
    called = call("train", "--data", tiny_breakhis, "--out", tmp_path / "run", "--epochs", 1, *TINY, "--quiet")
    assert called.code == 0 and called.err == ""


@pytest.mark.parametrize(
    ("stop", "message"),
    [(KeyboardInterrupt(), "interrupted"), (OSError(28, "No space left on device", "x"), "No space left on device: x")],
)
def test_interrupted_training_says_how_far_it_came(call, tiny_breakhis, tmp_path, monkeypatch, stop, message):
    real = train_command.fit

    def interrupt(config, *, stop_after, **options):
        real(config, stop_after=1, **options)
        raise stop

    monkeypatch.setattr(train_command, "fit", interrupt)
    called = call("train", "--data", tiny_breakhis, "--out", tmp_path / "run", "--epochs", 3, *TINY)
    assert called.code == 1 and "stopped with 1 of 3 epochs complete" in called.err and "Traceback" not in called.err
    assert f"--out {tmp_path / 'run'} --resume" in called.err and message in called.err


def test_the_header_says_what_is_trained_on_what(call, tiny_breakhis, tmp_path):
    out = tmp_path / "run"
    first = call("train", "--data", tiny_breakhis, "--out", out, "--epochs", 2, "--stop-after", 1, *TINY)
    state = load_checkpoint(out / "last.pt")
    patients = {
        name: len({parse_name(f"{i}.png").patient for i in state[f"{name}_images"]}) for name in ("train", "val")
    }
    for expected in (
        f"{tiny_breakhis}: training {len(state['train_images'])} images of {patients['train']} patients",
        f"validation {len(state['val_images'])} images of {patients['val']} patients",
        " test patients", "32x32 pixels, stains of SOB_", "classes benign, malignant", "er_resnet18, 0.",
        "CPU, 1 threads, 32-true; 2 epochs of ",
    ):  # fmt: skip
        assert expected in first.err, expected
    assert first.err.index("er_resnet18") < first.err.index("epoch 1/2")
    assert "resumed after epoch 1" in call("train", "--out", out, "--resume").err


def test_the_folder_of_a_run_is_evaluated_by_its_best_checkpoint(call, trained):
    found = call("evaluate", trained.folder, "--json").json
    assert found == call("evaluate", trained.best_checkpoint, "--json").json
    assert found["checkpoint"] == str(trained.best_checkpoint)


def test_a_json_file_is_no_checkpoint(call, trained):
    called = call("evaluate", trained.folder / "history.json")
    assert called.code == 2 and "no checkpoint" in called.err and "weights_only" not in called.err


def test_every_setting_is_an_option(call):
    shown = call("train", "--help").out
    assert all(f"--{name.replace('_', '-')}" in shown for name in TrainConfig.__dataclass_fields__)
    assert all(f"\n{title}:\n" in shown for title in train_command._GROUPS.values())


def test_evaluate_json_is_pure_and_complete(call, trained, tiny_breakhis, tmp_path):
    called = call("evaluate", trained.best_checkpoint, "--json", "--out", tmp_path / "evaluation")
    figures = called.json
    assert called.code == 0 and figures["split"] == "test" and set(figures["by_magnification"]) == {"100X", "200X"}
    assert figures["data"] == str(tiny_breakhis) and figures["magnifications"] is figures["max_images"] is None
    assert figures["overall"]["images"] == sum(map(sum, figures["confusion_matrix"])) > 0
    assert len(figures["patient_scores"]) == figures["patients"]
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text()) == figures
    with open(tmp_path / "evaluation" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == figures["overall"]["images"]
    right = sum(row["true"] == row["predicted"] for row in rows) / len(rows)
    assert right == pytest.approx(figures["overall"]["accuracy"], abs=1e-6)
    assert all(float(row["p_benign"]) + float(row["p_malignant"]) == pytest.approx(1) for row in rows)
    for name, value in figures["overall"].items():
        bounds = figures["intervals"]["overall"].get(name)
        assert bounds is None or bounds[0] <= value <= bounds[1], name
    for name in (
        "confusion_matrix", "confusion_by_magnification", "roc", "roc_bands", "reliability", "mistakes", "history"
    ):  # fmt: skip
        assert (tmp_path / "evaluation" / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    page = (tmp_path / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 7 and 'src="http' not in page and "Table 1" in page and "25.58" not in page
    worst = figures["mistakes"]
    assert 0 < len(worst) <= 8 and all(fact["true"] != fact["predicted"] for fact in worst)
    assert [fact["p_true"] for fact in worst] == sorted(fact["p_true"] for fact in worst)
    assert worst[0]["image"] in page and f"seed={figures['settings']['seed']}" in page
    assert figures["environment"]["packages"]["torch"] == torch.__version__


def test_evaluate_table(call, trained):
    called = call("evaluate", trained.best_checkpoint, "--patients", "--magnifications", 200)
    assert called.code == 0 and "recall" in called.out and "200X" in called.out and "100X" not in called.out
    assert "patient recognition rate" in called.out and "90" in called.out
    assert "95 % intervals: 2000 bootstrap resamples of patients" in called.out and "patient AUC" in called.out
    without = call("evaluate", trained.best_checkpoint, "--resamples", 0)
    assert without.code == 0 and "intervals" not in without.out
    assert call("evaluate", trained.best_checkpoint, "--resamples", 5).code == 2


def test_evaluate_limits_and_damage(call, trained, tmp_path, tiny_breakhis):
    called = call("evaluate", trained.best_checkpoint, "--max-images", 5, "--json")
    assert called.json["overall"]["images"] == 5
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(trained.best_checkpoint.read_bytes()[:1000])
    called = call("evaluate", damaged)
    assert called.code == 2 and "damaged" in called.err and "Traceback" not in called.err


def test_a_corrupt_training_image_is_named(call, tiny_breakhis, tmp_path):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(tiny_breakhis, data)
    for victim in data.rglob("*.png"):
        victim.write_bytes(victim.read_bytes()[:100])
    called = call("train", "--data", data, "--out", tmp_path / "run", "--epochs", 1, *TINY)
    assert called.code == 2 and ".png" in called.err and "truncated" in called.err
    skipped = call("train", "--data", data, "--out", tmp_path / "run2", "--on-error", "skip", *TINY)
    assert skipped.code == 2 and "no image is left" in skipped.err


def test_images_left_out_are_told(call, tiny_breakhis, tmp_path):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(tiny_breakhis, data)
    victim = sorted(data.rglob("*.png"))[0]
    (victim.parent / "SOB_B_A-odd.png").write_bytes(victim.read_bytes())
    called = call("train", "--data", data, "--out", tmp_path / "run", "--epochs", 1, "--on-error", "skip", *TINY)
    assert called.code == 0 and "warning: left out" in called.err and "SOB_B_A-odd.png" in called.err
    assert "SOB_B_A-odd.png" in (tmp_path / "run" / "skipped.csv").read_text()


def test_warnings_are_one_line(call, tiny_breakhis, tmp_path):
    """With eight classes and few patients a split lacks some of them."""
    called = call(
        "train", "--data", tiny_breakhis, "--out", tmp_path / "run", "--epochs", 1, "--target", "subtype", *TINY
    )
    assert called.code == 0
    warned = [line for line in called.err.splitlines() if "has no image of" in line]
    assert warned and all(line.startswith("warning: split") for line in warned)


@pytest.mark.parametrize("format", ["torchscript", "onnx"])
def test_export(call, trained, tmp_path, format):
    """The file's logits are those of `evaluate`'s network, on float input of any size."""
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"needs {package}")
    file = tmp_path / "network"
    called = call("export", trained.folder, "--format", format, "--out", file, "--json")
    assert called.code == 0 and "stain normalisation is not part of the file" in called.err
    found = called.json
    assert found["file"] == str(file) and found["classes"] == ["benign", "malignant"] and found["difference"] < 1e-5
    assert found["input"] == "float32 [N, 3, H, W], scaled as in training"
    program = load_exported(file, format)
    assert program(torch.zeros(2, 3, 48, 40)).shape == (2, 2)
    again = call("export", trained.folder, "--format", format)
    assert again.code == 0 and "best." in again.out and "logits of benign, malignant" in again.out


@pytest.mark.parametrize(("format", "tolerance"), [("torchscript", 1e-4), ("onnx", 1e-2)])
def test_export_with_preprocessing(call, trained, tmp_path, format, tolerance):
    """uint8 images of their own size go in; what `evaluate` does to them is in the program."""
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"needs {package}")
    file, size = tmp_path / "network", (46, 70)
    options = ["--with-preprocessing", "--input-size", *size, "--format", format, "--out", file]
    called = call("export", trained.folder, *options)
    assert called.code == 0 and "images uint8 [N, 3, 46, 70]" in called.out
    coarse = torch.rand((3, 3, 6, 9), generator=torch.Generator().manual_seed(1))
    images = torch.nn.functional.interpolate(255 * coarse, size, mode="bilinear").to(torch.uint8)
    bare = tmp_path / "bare"
    assert call("export", trained.folder, "--format", "torchscript", "--out", bare).code == 0
    expected = load_exported(bare, "torchscript")(torch.stack([PatchTransform(32)(image) for image in images]))
    found = load_exported(file, format)(images)
    assert float((found - expected).norm()) < tolerance * float(expected.norm())


def test_what_export_refuses(call, trained, tmp_path):
    sized = call("export", trained.folder, "--format", "pt2", "--input-size", 64, 64)
    assert sized.code == 2 and "input_size is of images that are resized in the program" in sized.err
    taken = call("export", trained.folder, "--format", "torchscript", "--out", trained.folder / "best.pt")
    assert taken.code == 2 and "is the checkpoint: name another file" in taken.err
    nothing = call("export", tmp_path / "none.pt", "--format", "pt2")
    assert nothing.code == 2 and "no checkpoint at" in nothing.err
