"""Bags, their attention, and what is written of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ernet_fast.attend import AttendSettings, Bag, attend, make_bags
from ernet_fast.attend.bags import collate
from ernet_fast.attend.fit import Bags, class_weights, train_attention
from ernet_fast.cli import main
from ernet_fast.data import parse_name
from ernet_fast.models.attention_pool import POOLS, MagnificationAttention
from ernet_fast.train import Reporter, TrainConfig, fit

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def run_folder(tiny_breakhis: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch at 100X and 200X."""
    out = tmp_path_factory.mktemp("attend") / "run"
    config = TrainConfig(
        data=str(tiny_breakhis), out=str(out), base_channels=8, image_size=32, batch_size=8, epochs=1, device="cpu"
    )
    fit(config, reporter=QUIET)
    return out


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower with several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_bags_are_slides_or_patients():
    names = ["B_F-14-21998AB-40-1", "B_F-14-21998CD-100-1", "B_PT-14-21998AB-40-1", "B_F-14-21998AB-200-2"]
    samples = [parse_name(f"SOB_{name}.png") for name in names]
    assert make_bags(samples) == [Bag("14-21998AB", 0, (0, 2, 3)), Bag("14-21998CD", 0, (1,))]
    assert make_bags(samples, "patient") == [Bag("21998", 0, (0, 1, 2, 3))]
    labelled = [sample._replace(label=k) for sample, k in zip(samples, (1, 1, 2, 1), strict=True)]
    assert [bag.label for bag in make_bags(labelled)] == [1, 2, 1]
    with pytest.raises(ValueError, match="by='ward'"):
        make_bags(samples, "ward")


def test_collate_pads():
    bags = [Bag("a", 1, (0, 2)), Bag("b", 0, (1,))]
    values = torch.arange(6.0).reshape(3, 2)
    batch = collate(bags, [[0, 2], [1]], [values[[0, 2]], values[[1]]], torch.tensor([40, 100, 400]))
    assert batch.there.tolist() == [[True, True], [True, False]] and batch.labels.tolist() == [1, 0]
    assert batch.embeddings[0].tolist() == [[0, 1], [4, 5]] and batch.embeddings[1, 0].tolist() == [2, 3]
    assert batch.magnification[0].tolist() == [40, 400] and batch.magnification[1, 0] == 100


def test_class_weights_by_hand():
    assert class_weights([0, 0, 0, 2], 3).tolist() == pytest.approx([4 / 6, 0, 2])


@pytest.mark.parametrize("pool", POOLS)
def test_attention_finds_the_one_field_that_tells(pool):
    """Bags of six fields of noise; one field of each bag of the second class has a mark."""
    generator = torch.Generator().manual_seed(0)
    values = 0.5 * torch.randn((96 * 6, 8), generator=generator)
    powers = torch.tensor([40, 100, 200, 400, 400, 400]).repeat(96)
    bags, marked = [], {}
    for k in range(96):
        places = tuple(range(6 * k, 6 * k + 6))
        marked[k] = 6 * k + 3 + k % 3
        if k % 2:
            values[marked[k], 0] += 4.0
        bags.append(Bag(str(k), k % 2, places))
    torch.manual_seed(0)
    attention = MagnificationAttention(8, 2, pool=pool, features=32, dropout=0.0)
    settings = AttendSettings(pool=pool, epochs=1, lr=5e-3, batch_size=8)
    history = train_attention(
        attention, Bags(bags[:64], bags[64:80], powers), lambda p: values[list(p)], settings, epochs=12
    )
    assert history[-1]["train_loss"] < 0.3 * history[0]["train_loss"]
    right, weight = 0, 0.0
    with torch.no_grad():
        for k in range(80, 96):
            output = attention(values[None, 6 * k : 6 * k + 6], powers[None, :6])
            right += int(output.logits.argmax()) == k % 2
            weight += float(output.weights[0, marked[k] - 6 * k]) / 8 if k % 2 else 0.0
    # of 16; reached are 15 and 13
    assert right >= (14 if pool == "gated" else 12)
    if pool == "gated":  # self-attention may carry the mark to other fields before they are weighed
        assert weight > 0.5


def test_everything_is_written_and_adds_up(run_folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["attend", str(run_folder), "--out", str(out), "--epochs", "3", "--device", "cpu", "--quiet"]
    assert main([*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    with open(out / "bags.csv", newline="") as file:
        bags = list(csv.DictReader(file))
    with open(out / "attention.csv", newline="") as file:
        fields = list(csv.DictReader(file))
    assert len(bags) == 16 and sum(int(bag["images"]) for bag in bags) == len(fields) == 64
    assert {bag["part"] for bag in bags} == {"train", "val", "test"}
    assert len({(f["bag"], f["part"]) for f in fields}) == len({f["bag"] for f in fields}) == 16
    for bag in bags:
        weights = [float(f["weight"]) for f in fields if f["bag"] == bag["bag"]]
        assert sum(weights) == pytest.approx(1, abs=1e-4) and len(weights) == int(bag["images"])
        assert float(bag["p_benign"]) + float(bag["p_malignant"]) == pytest.approx(1, abs=1e-5)
    tested = [bag for bag in bags if bag["part"] == "test"]
    right = sum(bag["true"] == bag["predicted"] for bag in tested) / len(tested)
    assert figures["metrics"]["test"]["attention"]["accuracy"] == pytest.approx(right)
    assert figures["metrics"]["test"]["mean"]["bags"] == len(tested)
    shares = figures["attention_by_magnification"]
    assert sum(entry["attention"] for entry in shares.values()) == pytest.approx(1, abs=1e-4)
    assert {entry["fields"] for entry in shares.values()} == {0.5}
    page = (out / "report.html").read_text()
    assert "Attention by magnification" in page and page.count("data:image/png") >= 2
    state = torch.load(out / "attention.pt", weights_only=True)
    assert state["network"] is None and state["magnifications"] == [100, 200]
    before = (out / "embeddings.pt").stat().st_mtime_ns
    assert main([*arguments, "--by", "patient", "--pool", "multihead"]) == 0  # the embeddings are found
    assert (out / "embeddings.pt").stat().st_mtime_ns == before
    assert "of the attention" in capsys.readouterr().out


def test_end_to_end_trains_the_network_too(run_folder, tmp_path):
    settings = AttendSettings(epochs=1, tune_epochs=1, fields=2, tune_lr=1e-3)
    result = attend(run_folder, tmp_path / "out", settings=settings, device="cpu", reporter=QUIET)
    assert [record["epoch"] for record in result.history] == [1, 1]
    saved = torch.load(tmp_path / "out" / "attention.pt", weights_only=True)["network"]
    first = torch.load(run_folder / "best.pt", weights_only=True)["model"]
    assert saved.keys() == first.keys()
    assert not torch.equal(saved["conv1.weight"], first["conv1.weight"])
    assert torch.equal(saved["bn1.running_mean"], first["bn1.running_mean"])


@pytest.mark.parametrize(
    ("name", "value"), [("by", "ward"), ("pool", "max"), ("epochs", 0), ("dropout", 1.0), ("lr", -1)]
)
def test_settings_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        AttendSettings(**{name: value})
