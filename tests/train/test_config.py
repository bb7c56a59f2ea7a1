"""Settings are documented, checked, and survive a round trip."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from ernet_fast import models
from ernet_fast.data.layout import MAGNIFICATIONS
from ernet_fast.train import TrainConfig, config

GIVEN = {"data": "d", "out": "o"}


def test_every_setting_has_a_meaning():
    for item in fields(TrainConfig):
        assert item.metadata["meaning"], item.name


def test_round_trip_through_json():
    before = TrainConfig(**GIVEN, magnifications=(40, 200), lr=0.01)
    assert TrainConfig.from_dict(json.loads(json.dumps(before.to_dict()))) == before


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"epochs": 0}, ValueError, "epochs=0; expected a value between 1 and"),
        ({"epochs": 2.5}, TypeError, r"epochs=2\.5; expected an integer"),
        ({"epochs": True}, TypeError, "epochs=True"),
        ({"lr": float("nan")}, ValueError, "lr=nan"),
        ({"lr": "fast"}, TypeError, "lr='fast'; expected a number"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing"),
        ({"optimizer": "adagrad"}, ValueError, "expected one of 'adamw', 'adam', 'sgd'"),
        ({"precision": "fp8"}, ValueError, "precision='fp8'"),
        ({"magnifications": (50,)}, ValueError, r"magnifications=\(50,\)"),
        ({"magnifications": ()}, ValueError, "magnifications"),
        ({"magnifications": [40]}, TypeError, "tuple"),
        ({"fold": 5}, ValueError, "0 <= fold < num_folds"),
        ({"stain": "none", "stain_target": "a.png"}, ValueError, "drop one"),
        ({"num_groups": 4}, ValueError, "norm='group'"),
        ({"augment": 1}, TypeError, "True or False"),
        ({"data": ""}, TypeError, "expected a path"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"model": None}, TypeError, "model is None"),
    ],
)
def test_wrong_values_are_named(changes, error, match):
    with pytest.raises(error, match=match):
        TrainConfig(**(GIVEN | changes))


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match="unknown setting.* learning_rate"):
        TrainConfig.from_dict(GIVEN | {"learning_rate": 1})


def test_lists_of_choices_agree_with_the_library():
    assert config.MAGNIFICATIONS == MAGNIFICATIONS
    assert all(hasattr(models, name) for name in config.ER_MODELS)


def test_the_documentation_lists_every_setting():
    page = Path(__file__).resolve().parents[2] / "docs" / "training.md"
    text = page.read_text(encoding="utf-8").split("## Settings")[1]
    for item in fields(TrainConfig):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{item.name}` |"))
        assert item.metadata["meaning"] in row, item.name
        if item.default is not MISSING and item.default is not None:
            assert f"`{item.default!r}`" in row, item.name
