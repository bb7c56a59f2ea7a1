"""Checkpoints: one file that holds a whole run, replaced in one step, read without running code."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import torch

from ernet_fast.console.atomic_file import atomic_write

FORMAT = 1
_KEYS = ("format", "version", "model", "optimizer", "schedule", "precision", "epoch", "step", "history", "best", "rng",
         "config", "classes", "train_images", "stain")  # fmt: skip


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) atomically.

    Raises:
        ValueError: `state` lacks a part of a checkpoint.
    """
    missing = [key for key in _KEYS if key not in state]
    if missing:
        raise ValueError(f"the checkpoint lacks {', '.join(missing)}.")
    with atomic_write(path) as file:
        torch.save(state, file)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Only tensors and plain values are accepted: a file cannot run code.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no checkpoint of this library, is damaged, or comes from a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {str(path)!r}.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reports damage as RuntimeError, UnpicklingError, EOFError, KeyError, ...
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is no checkpoint or is damaged: {reason}") from error
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{path} is no checkpoint of ernet_fast (expected the file that `ernet-fast train` writes).")
    if state["format"] != FORMAT:
        raise ValueError(f"{path} has checkpoint format {state['format']}; this version reads format {FORMAT}.")
    missing = [key for key in _KEYS if key not in state]
    if missing:
        raise ValueError(f"{path} is incomplete: it lacks {', '.join(missing)}.")
    return state


def generator_state() -> dict[str, Any]:
    """State of the random generators of torch (CPU and this process's CUDA device) and Python."""
    version, internal, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": (version, internal, gauss)}


def restore_generators(state: dict[str, Any]) -> None:
    """Set the random generators back to what `generator_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
