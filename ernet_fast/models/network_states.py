"""Where in a checkpoint the weights of a ResNet are, by the names of its parameters.

Training scripts, Lightning, DistributedDataParallel, `torch.compile`, weight averaging and self-supervised methods each
wrap a network's state dict in keys and prefixes of their own.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

_FIRST_BLOCK = "layer1.0.conv1.weight"
# The children of torchvision's ResNet, in order: many encoders are `nn.Sequential(*list(resnet.children())[:-1])`.
_NUMBERED = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4", "9": "fc"}
_NUMBERED_FIRST_BLOCK = "4.0.conv1.weight"
# Parts of names that wrappers insert at any depth.
_WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
_USUAL_KEYS = ("state_dict", "model_state_dict", "model")
_DEPTH = 4
_LISTED = 5


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
    place = places[0] if len(places) == 1 else _usual_place(places)
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


def _usual_place(places: list[_Place]) -> _Place:
    for usual in _USUAL_KEYS:
        under = [place for place in places if place.keys[-1:] == (usual,)]
        if len(under) == 1:
            return under[0]
    first = places[0]
    found = listed([f"{place.path} {place.prefix!r}" for place in places])
    raise ValueError(
        f"the weights hold several networks: {found}. Write one of them to a file of its own, such as the first by:\n"
        f"  python -c \"import torch; s = torch.load('FILE'){first.path}; torch.save("
        f"{{k: v for k, v in s.items() if k.startswith({first.prefix!r})}}, 'weights.pth')\""
    )


def listed(items: list[str]) -> str:
    """The first of `items`, and how many more there are."""
    shown = ", ".join(items[:_LISTED])
    return shown if len(items) <= _LISTED else f"{shown} and {len(items) - _LISTED} more"
