"""Loading of torchvision's and of our own ResNet weights into an ER-ResNet."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ernet_fast._optional import require

_LISTED = 5


def read_weights(weights: str | PathLike[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict held by `weights`, on the CPU where it is read from a file.

    Args:
        weights: a state dict, or the path of a file written by `torch.save` or safetensors (.safetensors). A
            checkpoint that holds the state dict under "state_dict" or "model" and keys with
            DistributedDataParallel's prefix "module." are understood. Files are read with `weights_only=True`.

    Raises:
        TypeError: neither a path nor a mapping, or a mapping whose values are not tensors.
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read.
        ImportError: a .safetensors file without the safetensors package.
    """
    if isinstance(weights, Mapping):
        state = weights
    elif isinstance(weights, (str, PathLike)):
        state = _read_file(Path(fspath(weights)))
    else:
        raise TypeError(f"weights must be a path, a state dict or None, got {type(weights).__name__}")
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    wrong = [str(key) for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if wrong:
        raise TypeError(f"weights must map names to tensors, but these entries are none: {_listed(wrong)}")
    if state and all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)


def load_torchvision_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy the weights of a torchvision ResNet, or of an ER-ResNet, of the same architecture into `model`.

    Every convolution, BatchNorm and classifier tensor of `model` must be in `state`, in its shape. Parameters and
    statistics of the shortcuts (`layer2.1.shortcut.weight`, ...) are loaded if `state` has them and left as they are
    if it has none: a new model has ER weights of 1 and untrained statistics, so it wants some training before it is
    evaluated.

    Args:
        model: an `ERResNet`.
        state: names to tensors; cast to the model's dtype and device.

    Raises:
        ValueError: missing, unknown or differently shaped entries; `model` is then unchanged.
    """
    own = model.state_dict()
    wrong = [
        f"{key} is {list(state[key].shape)}, expected {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    classes, expected = _num_classes(state), _num_classes(own)
    if classes != expected and None not in (classes, expected):
        raise ValueError(
            f"the weights are for {classes} classes and the model has num_classes={expected}. Build it with "
            f"num_classes={classes}, then call model.reset_classifier({expected})"
        )
    if wrong:
        raise ValueError(
            f"the weights are of another architecture (depth, width, block or in_channels): {_listed(wrong)}"
        )
    missing = own.keys() - state.keys()
    shortcuts = {key for key in own if ".shortcut." in key}
    if missing >= shortcuts:
        missing -= shortcuts
    # Checkpoints from before torch 0.4.1 do not count batches; the count only matters for a cumulative average.
    missing = {key for key in missing if not key.endswith("num_batches_tracked")}
    unknown = state.keys() - own.keys()
    if missing or unknown:
        raise ValueError(
            "the weights are of another architecture: "
            f"missing {_listed(sorted(missing)) or 'none'}; not in the model {_listed(sorted(unknown)) or 'none'}"
        )
    model.load_state_dict(dict(state), strict=False)


def _num_classes(state: Mapping[str, Tensor]) -> int | None:
    """Outputs of the linear classifier `fc`, 0 without one; None if `fc` is something else."""
    head = {name for name in state if name.startswith("fc.")}
    if not head:
        return 0
    return state["fc.weight"].shape[0] if head == {"fc.weight", "fc.bias"} else None


def _read_file(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"weights: no file {str(path)!r} (published weights are not downloaded; give a path)")
    if path.suffix == ".safetensors":
        load_file = require("safetensors.torch", extra="train", purpose="reading .safetensors weights").load_file
    else:
        load_file = _torch_load
    try:
        state = load_file(str(path))
    except Exception as error:  # safetensors and torch each have their own errors for a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"weights: cannot read {str(path)!r}: {reason}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"weights: {str(path)!r} holds a {type(state).__name__}, expected a state dict")
    return state


def _torch_load(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            "it holds more than tensors, or is no file of torch.save; write it again with "
            "torch.save(model.state_dict(), path)"
        ) from error


def _listed(items: list[str]) -> str:
    shown = ", ".join(items[:_LISTED])
    return shown if len(items) <= _LISTED else f"{shown} and {len(items) - _LISTED} more"
