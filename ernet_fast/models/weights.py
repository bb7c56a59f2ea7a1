"""Loading of torchvision's and of our own ResNet weights into an ER-ResNet.

Training scripts, Lightning, DistributedDataParallel, `torch.compile`, weight averaging and self-supervised methods each
wrap a network's state dict in keys and prefixes of their own: a ResNet is found by the names of its parameters.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ernet_fast._optional import require

_FIRST_BLOCK = "layer1.0.conv1.weight"
# The children of torchvision's ResNet, in order: many encoders are `nn.Sequential(*list(resnet.children())[:-1])`.
_NUMBERED = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4", "9": "fc"}
_NUMBERED_FIRST_BLOCK = "4.0.conv1.weight"
# Parts of names that wrappers insert at any depth.
_WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
_USUAL_KEYS = ("state_dict", "model_state_dict", "model")
_DEPTH = 4
_LISTED = 5


def read_weights(weights: str | PathLike[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of the ResNet in `weights`, on the CPU where it is read from a file.

    Args:
        weights: a state dict, or the path of a file written by `torch.save` or safetensors (.safetensors). The
            network is found by the names of its parameters: under a key ("state_dict", "model_state_dict", ...),
            behind a prefix ("module.", "_orig_mod.", "model.", "encoder.", ...), or as numbered children of an
            `nn.Sequential`. Of several ("state_dict" beside "state_dict_ema") the one under "state_dict",
            "model_state_dict" or "model" is taken. Files are read with `weights_only=True`.

    Raises:
        TypeError: neither a path nor a mapping, or a mapping whose values are not tensors.
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or holds several networks.
        ImportError: a .safetensors file without the safetensors package.
    """
    if isinstance(weights, Mapping):
        checkpoint = weights
    elif isinstance(weights, (str, PathLike)):
        checkpoint = _read_file(Path(fspath(weights)))
    else:
        raise TypeError(f"weights must be a path, a state dict or None, got {type(weights).__name__}")
    state = network_state(checkpoint)
    wrong = [str(key) for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if wrong:
        raise TypeError(f"weights must map names to tensors, but these entries are none: {listed(wrong)}")
    return state


def load_torchvision_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy the weights of a torchvision ResNet, or of an ER-ResNet, of the same architecture into `model`.

    Every convolution and BatchNorm tensor of `model` must be in `state`, in its shape. Shortcuts
    (`layer2.1.shortcut.weight`, ...), which a plain ResNet has not, and the classifier `fc`, which an encoder has not,
    stay as they are if `state` has none of their entries: ER weights of 1 and untrained statistics then want training.

    Args:
        model: an `ERResNet`.
        state: names to tensors; cast to the model's dtype and device.

    Raises:
        ValueError: missing, unknown or differently shaped entries; `model` is then unchanged.
    """
    own = model.state_dict()
    _check_classifier(own, state)
    wrong = [
        f"{key} is {list(state[key].shape)}, expected {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if wrong:
        raise ValueError(
            f"the weights are of another architecture (depth, width, block or in_channels): {listed(wrong)}"
        )
    missing = own.keys() - state.keys()
    for part in ({key for key in own if is_shortcut_entry(key)}, set(_classifier(own))):
        if missing >= part:
            missing -= part
    # Checkpoints from before torch 0.4.1 do not count batches; the count only matters for a cumulative average.
    missing = {key for key in missing if not key.endswith("num_batches_tracked")}
    unknown = state.keys() - own.keys()
    if missing or unknown:
        raise ValueError(
            "the weights are of another architecture: "
            f"missing {listed(sorted(missing)) or 'none'}; not in the model {listed(sorted(unknown)) or 'none'}"
        )
    model.load_state_dict(dict(state), strict=False)


def is_shortcut_entry(key: str) -> bool:
    """True for the parameters and statistics of ER shortcuts, which a plain ResNet has not."""
    return ".shortcut." in f".{key}"


def _classifier(state: Mapping[str, Tensor]) -> list[str]:
    return [name for name in state if name.startswith("fc.")]


def _check_classifier(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError if `state` has a classifier, and one that does not fit."""
    found, expected = _classifier(state), _classifier(own)
    linear = {"fc.weight", "fc.bias"}
    if not found or (set(found) == set(expected) and not set(found) == linear):
        return
    if set(found) == linear and set(expected) in (linear, set()):
        classes, num_classes = len(state["fc.weight"]), len(own["fc.weight"]) if expected else 0
        if classes != num_classes:
            raise ValueError(
                f"the weights are for {classes} classes and the model has num_classes={num_classes}. Build it with "
                f"num_classes={classes}, then call model.reset_classifier({num_classes})"
            )
        return
    raise ValueError(
        f"the classifier of the weights is another ({listed(found)}; expected {listed(expected) or 'none'}). Leave it "
        "out by:\n  python -c \"import torch, ernet_fast.models as m; s = m.read_weights('FILE'); "
        "torch.save({k: v for k, v in s.items() if not k.startswith('fc.')}, 'encoder.pth')\""
    )


def _read_file(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"weights: no file {str(path)!r} (published weights are not downloaded; give a path)")
    try:
        if path.suffix == ".safetensors":
            load_file = require("safetensors.torch", extra="train", purpose="reading .safetensors weights").load_file
            state = load_file(str(path))
        else:
            state = _torch_load(path)
    except ImportError:
        raise
    except Exception as error:  # safetensors and torch each have their own errors for a damaged file
        reason = str(error) or type(error).__name__
        if not isinstance(error, _FileError):
            reason = reason.splitlines()[0]
        raise ValueError(f"weights: cannot read {str(path)!r}: {reason}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"weights: {str(path)!r} holds a {type(state).__name__}, expected a state dict")
    return state


class _FileError(ValueError):
    """A file that is not read, and why; to be shown whole."""


def _torch_load(path: Path) -> Any:
    with open(path, "rb") as file:
        start = file.read(2)
    if start and start != b"PK" and start[:1] != b"\x80":  # neither a ZIP archive nor a pickle
        raise _FileError("it is no file of torch.save (.pt, .pth) or safetensors (.safetensors)")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain data; timm and many scripts save theirs
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        try:
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except Exception:  # a damaged or an old file
            names = []
        raise _FileError(
            f"it holds more than tensors{f' ({listed(names)})' if names else ''}, or is no file of torch.save. If you "
            "trust whoever wrote it, for reading it runs code, write the weights alone by:\n  "
            f'python -c "import torch; s = torch.load({str(path)!r}, weights_only=False); torch.save('
            "s.state_dict() if hasattr(s, 'state_dict') else {k: v for k, v in s.items() if 'state_dict' in k "
            "or k == 'model' or torch.is_tensor(v)}, 'weights.pth')\""
        ) from error


class _Place(NamedTuple):
    """A network in a checkpoint: the keys that lead to its mapping, the prefix of its names, and these entries."""

    keys: tuple[str, ...]
    prefix: str
    entries: dict[str, Any]

    @property
    def path(self) -> str:
        return "".join(f"[{key!r}]" for key in self.keys)


def network_state(checkpoint: Mapping[Any, Any]) -> dict[Any, Any]:
    """The entries of the ResNet that `checkpoint` holds, under the network's own names.

    Where no ResNet is found the checkpoint is returned as it is, or what it has under a usual key ("state_dict").
    Entries beside the network, such as those of a projection head, are left out with a warning. Of several networks
    none of which is under a usual key, ValueError names each.
    """
    places = list(_places(checkpoint, (), _DEPTH))
    if not places:
        for key in _USUAL_KEYS:
            if isinstance(checkpoint.get(key), Mapping):
                checkpoint = checkpoint[key]
        return dict(checkpoint)
    under = [[place for place in places if place.keys[-1:] == (key,)] for key in _USUAL_KEYS]
    place, *others = next((found for found in under if len(found) == 1), places)
    if others:
        found = listed([f"{other.path} {other.prefix!r}" for other in places])
        raise ValueError(
            f"the weights hold several networks: {found}. Write one of them to a file of its own, such as the first "
            f"by:\n  python -c \"import torch; s = torch.load('FILE'){place.path}; torch.save("
            f"{{k: v for k, v in s.items() if k.startswith({place.prefix!r})}}, 'weights.pth')\""
        )
    inside = {key: value for key, value in place.entries.items() if str(key).startswith(place.prefix)}
    outside = [str(key) for key in place.entries if key not in inside and key != "n_averaged"]
    if outside:
        warnings.warn(
            f"the weights are those under the prefix {place.prefix!r}; left out: {listed(outside)}", stacklevel=3
        )
    state = {str(key)[len(place.prefix) :]: value for key, value in inside.items()}
    if _FIRST_BLOCK in state:
        return state
    children = {key: key.partition(".") for key in state}
    return {_NUMBERED.get(child, child) + dot + rest: state[key] for key, (child, dot, rest) in children.items()}


def _places(mapping: Mapping[Any, Any], keys: tuple[str, ...], depth: int) -> Iterator[_Place]:
    entries = {_WRAPPERS.sub("", key) if isinstance(key, str) else key: value for key, value in mapping.items()}
    for key in entries:
        for name in (_FIRST_BLOCK, _NUMBERED_FIRST_BLOCK):
            if isinstance(key, str) and (key == name or key.endswith(f".{name}")):
                yield _Place(keys, key.removesuffix(name), entries)
    for key, value in mapping.items():
        if isinstance(value, Mapping) and depth > 0:
            yield from _places(value, (*keys, str(key)), depth - 1)


def listed(items: list[str]) -> str:
    """The first of `items`, and how many more there are."""
    shown = ", ".join(items[:_LISTED])
    return shown if len(items) <= _LISTED else f"{shown} and {len(items) - _LISTED} more"
