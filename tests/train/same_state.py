"""Runs compared to the last bit."""

from __future__ import annotations

from pathlib import Path

import torch

from ernet_fast.train import TrainConfig, load_checkpoint


def assert_same(found, expected, where="checkpoint"):
    """Equal to the last bit: tensors, numbers and structure."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    else:
        assert found == expected, where


def final_state(config: TrainConfig) -> dict:
    state = load_checkpoint(Path(config.out) / "last.pt")
    for record in (*state["history"], state["best"]):
        for name in ("train_seconds", "data_wait"):  # these and the folder may differ
            record.pop(name, None)
    for name in ("out", "save_steps"):
        del state["config"][name]
    return state
