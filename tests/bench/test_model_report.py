"""Tables and pictures of whole networks, and the study of fine-tuning that fills one of them."""

from __future__ import annotations

import finetune_converted
import model_tables
import pytest
from record import Record, Row, read
from records import Records
from test_er_report import MACHINE


def network(key, name, step, activations, inference, place):
    figures = {
        "key": key, "name": name, "step": {"p50_ms": step}, "step_images_per_second": 8e3 / step, "peak_bytes": 2**30,
        "activation_bytes": activations * 2**20,
    }  # fmt: skip
    if inference is not None:
        figures |= {"inference": {"p50_ms": inference}, "inference_images_per_second": 8e3 / inference}
    params = {"model": "er_resnet50", "batch": 8, "size": 224, "network": key}
    info = {"place": place, "threads": 2, "figures": figures}
    return Row("bench_models", f"models[er_resnet50-8-{key}]", "bench model", params, step, step, step, "ms", 5, info)


def test_networks_are_shown_beside_the_plain_one(tmp_path):
    record = Record.of(MACHINE, tmp_path)
    record.add(network("lean", "ER-ResNet-50, memory lean", 2100.0, 570, None, 1))
    record.add(network("plain", "ResNet-50", 2000.0, 1000, 400.0, 0))
    found = model_tables.TABLES["readme-models"](Records(tmp_path)).splitlines()
    assert found[0].startswith("![") and found[0].endswith("(docs/model_speed.png)")
    assert found[2] == "8 images of 224 x 224, float32, channels-last, 2 threads:"
    assert found[-2:] == [
        "| ResNet-50 | 2 s | 1 | 4 | 1024 MiB | 1000 MiB | 1 | 400 ms | 1 |",
        "| **ER-ResNet-50, memory lean** | 2.1 s | 1.05 | 3.81 | 1024 MiB | 570 MiB | 0.57 | – | – |",
    ]
    pytest.importorskip("matplotlib")
    assert model_tables.PICTURES["model_speed.png"](Records(tmp_path)) is not None


def test_what_was_not_measured_is_said_and_not_drawn(tmp_path):
    empty = Records(tmp_path)
    assert all(made(empty).startswith("Not measured.") for made in model_tables.TABLES.values())
    assert all(make(empty) is None for make in model_tables.PICTURES.values())


def test_the_study_of_fine_tuning(tmp_path, tiny_breakhis, monkeypatch):
    """Every phase on a small folder, each a row; the calibrated conversion of two blocks a stage starts as it was."""
    small = [
        "--depth",
        "18",
        "--base-channels",
        "16",
        "--size",
        "32",
        "--batch",
        "8",
        "--epochs",
        "1",
        "--tuning-epochs",
        "1",
    ]
    monkeypatch.setattr(finetune_converted, "describe", lambda kind: MACHINE)
    assert finetune_converted.main(["--data", str(tiny_breakhis), "--record", str(tmp_path), *small]) == 0
    (path,) = tmp_path.glob("*.json")
    rows = {row.extra_info["phase"]: row.extra_info for row in read(path)[1]}
    assert list(rows) == list(finetune_converted.PHASES)
    assert [len(info["history"]) for info in rows.values()] == [2, 2, 2, 2]
    before = rows["plain"]["history"][-1]["accuracy"]
    for phase in ("calibrated", "control"):
        assert rows[phase]["top1"] == 1.0 and rows[phase]["start"]["accuracy"] == before
    table = model_tables.TABLES["fine-tuning"](Records(tmp_path))
    assert "ResNet-18 with 16 channels in its stem" in table and table.count("\n|") == 6
    pytest.importorskip("matplotlib")
    assert model_tables.PICTURES["fine_tuning.png"](Records(tmp_path)) is not None
