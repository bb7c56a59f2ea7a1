"""Checkpoints: one file that holds a whole run, replaced in one step, read without running code."""

from __future__ import annotations

import hashlib
import io
import math
import os
import pickle
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from ernet_fast.console.atomic_file import atomic_write

FORMAT = 2
_SINCE_2 = ("split", "val_images")
"""Fields that files of format 1, which are still read, do not have: None stands for them."""
_TRAILER = b"sha256:"
"""Behind the file of `torch.save`, which stays readable by `torch.load`; 64 hexadecimal digits follow."""


_TARGETS: dict[str, dict[str, tuple[tuple[int, ...], float]]] = {
    "macenko": {"HERef": ((3, 2), 0.0), "maxCRef": ((2,), 0.0)},
    "reinhard": {"target_means": ((3,), -math.inf), "target_stds": ((3,), 0.0)},
}
"""Method of stain normalisation to the tensors of its target: shape and least value."""


def _stain(found: Any) -> bool:
    if found is None:
        return True
    tensors = found.get("normalizer") if isinstance(found, dict) else None
    expected = _TARGETS["reinhard" if isinstance(found, dict) and found.get("method") == "reinhard" else "macenko"]
    return isinstance(tensors, dict) and all(
        isinstance(tensor := tensors.get(name), Tensor)
        and tuple(tensor.shape) == shape
        and bool((tensor.isfinite() & (tensor >= least)).all())
        for name, (shape, least) in expected.items()
    )


_FIELDS: dict[str, tuple[type, type, str]] = {
    "version": (str, str, "a string"),
    "model": (dict, Tensor, "tensors by name"),
    "optimizer": (dict, object, "a dictionary"),
    "schedule": (dict, object, "a dictionary"),
    "precision": (dict, object, "a dictionary"),
    "epoch": (int, int, "a number of epochs"),
    "step": (int, int, "a number of steps"),
    "history": (list, dict, "a list of records"),
    "best": (dict, object, "a record"),
    "rng": (dict, object, "states of random generators"),
    "config": (dict, object, "settings by name"),
    "classes": (list, str, "a list of names"),
    "split": (dict, object, "a split"),
    "train_images": (list, str, "a list of names"),
    "val_images": (list, str, "a list of names"),
    "stain": (
        object,
        object,
        "None or a target with finite HERef [3, 2] and maxCRef [2], not negative; Reinhard's: means and deviations [3]",
    ),
}
"""Fields of a checkpoint beside `format`: type, type of what it holds, and what is expected; keys are strings."""


def _is_right(field: str, found: Any) -> bool:
    kind, held, _ = _FIELDS[field]
    if field == "stain":
        return _stain(found)
    if isinstance(found, dict):
        return kind is dict and all(isinstance(k, str) and isinstance(v, held) for k, v in found.items())
    if isinstance(found, int):
        return kind is int and not isinstance(found, bool) and found >= 0
    is_kind = isinstance(found, kind)
    return is_kind and isinstance(found, (str, list)) and all(isinstance(item, held) for item in found)


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) atomically, with a checksum at its end.

    Raises ValueError if `state` lacks a field, OSError if the file cannot be written, e.g. on a full disk.
    """
    missing = [key for key in ("format", *_FIELDS) if key not in state]
    if missing:
        raise ValueError(f"the checkpoint lacks {', '.join(missing)}.")
    with atomic_write(path) as file:
        file.write(_TRAILER + _save(state, file))


def _save(state: dict[str, Any], file: IO[bytes]) -> bytes:
    """`torch.save`, which keeps the reason why a write failed to itself; returns the SHA-256 of what was written."""
    digest, failed = hashlib.sha256(), []

    class Watched:
        def write(self, data: Any) -> int:
            digest.update(data)
            try:
                return file.write(data)
            except OSError as error:
                failed.append(error)
                raise

        def flush(self) -> None:
            file.flush()

    try:
        torch.save(state, Watched())  # type: ignore[arg-type]
    except Exception:
        if failed:
            raise failed[0] from None
        raise
    return digest.hexdigest().encode()


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Only tensors and plain values are accepted: a file cannot run code.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no checkpoint of this library, is damaged (its checksum is verified), has another
            format, or a field that is not what it should be; the message names file and field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {str(path)!r}.")
    state = _read(path)
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{path} is no checkpoint of ernet_fast (expected the file that `ernet-fast train` writes).")
    if state["format"] not in (1, FORMAT):
        raise ValueError(f"{path} has checkpoint format {state['format']!r}; this version reads format {FORMAT}.")
    absent: tuple[str, ...] = ()
    if state["format"] == 1:
        warnings.warn(
            f"{path} is of checkpoint format 1, without a checksum and without the run's split: the split is made anew "
            "from the data. Check that no images were added or removed since.",
            stacklevel=2,
        )
        absent = _SINCE_2
        state |= dict.fromkeys(absent)
    missing = [key for key in _FIELDS if key not in state]
    if missing:
        raise ValueError(f"{path} is incomplete: it lacks {', '.join(missing)}.")
    for key, (_, _, expected) in _FIELDS.items():
        found = state[key]
        if key not in absent and not _is_right(key, found):
            raise ValueError(f"{path}: its {key!r} is {type(found).__name__} {str(found)[:60]!r}; expected {expected}.")
    return state


def _read(path: Path) -> Any:
    """The contents, once the checksum is right. Torch's messages advise to load unsafely and are not passed on."""
    data = path.read_bytes()
    end = len(data) - len(_TRAILER) - 64
    reason = "its checksum is wrong"
    if end < 0 or data[end : end + len(_TRAILER)] != _TRAILER:
        reason = "it does not end with the checksum that `ernet-fast train` writes"
        with suppress(Exception):  # whatever torch says of a file that is not its own
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            if isinstance(state, dict) and state.get("format") == 1:
                return state
    elif hashlib.sha256(memoryview(data)[:end]).hexdigest().encode() == data[-64:]:
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            reason = "it holds more than tensors and plain values, which is not loaded"
        except Exception as error:  # torch reports what it cannot read as RuntimeError, EOFError, KeyError, ...
            reason = f"reading it ends in {type(error).__name__}"
    raise ValueError(f"{path} is no checkpoint or is damaged: {reason}.")


@contextmanager
def field_of(path: str | os.PathLike[str], field: str) -> Iterator[None]:
    """Turn whatever goes wrong with a field of a checkpoint into one sentence that names file and field."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{os.fspath(path)}: its {field!r} does not fit: {reason}") from error


def load_network(network: nn.Module, state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Load the field `model` of a checkpoint. ValueError names the first difference and how many there are."""
    own, found = ({name: list(t.shape) for name, t in s.items()} for s in (network.state_dict(), state["model"]))
    wrong = [f"{name} is missing" for name in own if name not in found]
    wrong += [f"{name} is unknown" for name in found if name not in own]
    wrong += [f"{n} is {found[n]}, the network's {own[n]}" for n in own if found.get(n, own[n]) != own[n]]
    with field_of(path, "model"):
        if wrong:
            more = f" (and {len(wrong) - 1} more differences)" if len(wrong) > 1 else ""
            raise ValueError(f"{wrong[0]}{more}.")
        network.load_state_dict(state["model"])


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
