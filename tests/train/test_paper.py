"""The paper's tables: what is counted here beside what it says."""

from __future__ import annotations

from ernet_fast.train import TrainConfig, paper


def config(model: str = "er_resnet18", **changes) -> TrainConfig:
    return TrainConfig(data="d", out="o", model=model, **changes)


def test_table_1_counts_what_the_paper_counts():
    rows = paper.table_1([config("er_resnet18"), config("er_resnet50"), config(base_channels=16)])
    assert [row[:3] for row in rows[:2]] == [
        ["er_resnet18", "11.69 M", "11.69 M"], ["er_resnet50", "25.58 M", "25.58 M"]
    ]  # fmt: skip
    assert [row[4] for row in rows] == ["3.4", "7.8", "-"] and rows[2][2] == "-", "the paper has no narrow network"
    assert rows[1][3] == "8.19", "as in docs/models.md"


def test_table_2_has_a_row_for_each_magnification():
    group = {"images": 5, "accuracy": 0.8, "precision": None, "recall": 0.5, "f1": 0.25, "auc": 1.0}
    figures = {
        "by_magnification": {"40X": group},
        "by_patient": {"by_magnification": {"40X": {"patients": 3}}},
        "intervals": {"by_magnification": {"40X": {"accuracy": [0.5, 0.9], "precision": None, "auc": None}}},
    }
    expected = ["40X", "5", "3", "0.800 (0.500 to 0.900)", "-", "0.500", "0.250", "1.000"]
    assert paper.table_2(figures) == [expected] and len(paper.table_2_header()) == len(expected)
    assert paper.table_2(figures | {"intervals": None})[0][3] == "0.800"
