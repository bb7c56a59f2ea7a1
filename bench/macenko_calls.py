"""The calls that bench_macenko.py times, an image each: this library's and those of other packages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from this_tree import macenko_peers

from ernet_fast.stain import macenko_fit, macenko_normalize

OWN = ("ernet_fast", "ernet_fast channels-last")
PEERS = {peer.name: peer for peer in macenko_peers.peers_on("cpu")}
Call = Callable[[], Any]


def spread(count: int, most: int) -> list[int]:
    """`most` of `count` numbers at even distances, all where they are no more."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def own_calls(who: str, operation: str, images: Sequence[np.ndarray], target: np.ndarray) -> dict[int, Call]:
    """Calls of this library: on contiguous images [1, 3, H, W], or on channels-last ones."""
    function = macenko_fit if operation == "fit" else functools.partial(macenko_normalize, target=macenko_fit(target))
    return {number: functools.partial(function, tensor_of(image, who)) for number, image in enumerate(images)}


def tensor_of(image: np.ndarray, who: str = OWN[0]) -> torch.Tensor:
    """[1, 3, H, W] of an image [H, W, 3]: a copy, or for channels-last the same memory."""
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    return tensor if "channels-last" in who else tensor.contiguous()


def peer_calls(
    who: str, operation: str, images: Sequence[np.ndarray], target: np.ndarray, most: int
) -> dict[int, Call]:
    """Calls of another package, on `most` of the images."""
    peer, chosen = PEERS[who], spread(len(images), most)
    given = [macenko_peers.planar(images[number]) for number in chosen]
    if operation == "fit":
        return dict(zip(chosen, map(peer.fit, given), strict=True))
    calls = peer.normalize_each([image[None] for image in given], macenko_peers.planar(target))
    return dict(zip(chosen, calls, strict=True))


def calls_of(
    names: Sequence[str], operation: str, images: Sequence[np.ndarray], target: np.ndarray, most: int
) -> dict[str, dict[int, Call]]:
    """Contestant -> image -> call; packages that do not work here are left out, and why is printed."""
    calls = {who: own_calls(who, operation, images, target) for who in names if who in OWN}
    theirs: dict[str, dict[int, Call]] = {}

    def first_of(who: str) -> Call:
        theirs[who] = peer_calls(who, operation, images, target, most)
        return next(iter(theirs[who].values()))

    found, missing = macenko_peers.working({who: functools.partial(first_of, who) for who in names if who in PEERS})
    for name, reason in missing.items():
        print(f"not measured: {name}: {reason}")
    return calls | {who: theirs[who] for who in found}
