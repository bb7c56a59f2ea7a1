"""Other packages' Macenko normalisation, each in its own format and fitted to the same target, where it imports.

    torchstain        pip install torchstain
    stainx            pip install --no-deps --no-build-isolation stainx; without nvcc that leaves its CUDA part out
    torch-staintools  pip install --no-deps torch-staintools kornia kornia_rs torchvision
    tiatoolbox        pip install --no-deps tiatoolbox, and what its import asks for; it wants a torch before 2.13

A peer is a function of the target image [H, W, 3] uint8 that returns two functions of an image [H, W, 3] uint8, each of
which gives a call without arguments, with everything prepared: (normalise, fit).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Call = Callable[[], Any]
Peer = tuple[Callable[[np.ndarray], Call], Callable[[np.ndarray], Call]]


def planar(image: np.ndarray) -> torch.Tensor:
    """[3, H, W] uint8 of [H, W, 3]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def torchstain_numpy(target: np.ndarray) -> Peer:
    """torchstain's NumPy backend: the definition."""
    from torchstain import normalizers

    peer, other = normalizers.MacenkoNormalizer(backend="numpy"), normalizers.MacenkoNormalizer(backend="numpy")
    peer.fit(target)
    return lambda image: lambda: peer.normalize(image, stains=False), lambda image: lambda: other.fit(image)


def torchstain_torch(target: np.ndarray) -> Peer:
    """torchstain's torch backend."""
    from torchstain import normalizers

    peer, other = normalizers.MacenkoNormalizer(backend="torch"), normalizers.MacenkoNormalizer(backend="torch")
    peer.fit(planar(target))

    def normalize(image: np.ndarray) -> Call:
        mine = planar(image)
        return lambda: peer.normalize(mine, stains=False)

    def fit(image: np.ndarray) -> Call:
        mine = planar(image)
        return lambda: other.fit(mine)

    return normalize, fit


def stainx(target: np.ndarray) -> Peer:
    """stainx on its torch backend."""
    from stainx import Macenko

    peer, other = (Macenko(device="cpu", backend="torch") for _ in range(2))
    peer.fit(planar(target)[None])

    def normalize(image: np.ndarray) -> Call:
        mine = planar(image)[None]
        return lambda: peer.transform(mine)

    def fit(image: np.ndarray) -> Call:
        mine = planar(image)[None]
        return lambda: other.fit(mine)

    return normalize, fit


def torch_staintools(target: np.ndarray) -> Peer:
    """torch-staintools with its defaults, which takes images in [0, 1]."""
    let_torchvision_import()
    from torch_staintools.normalizer.factory import NormalizerBuilder

    peer, other = (NormalizerBuilder.build("macenko") for _ in range(2))
    peer.fit(planar(target)[None].float() / 255)

    def normalize(image: np.ndarray) -> Call:
        mine = planar(image)[None].float() / 255
        return lambda: peer(mine)

    def fit(image: np.ndarray) -> Call:
        mine = planar(image)[None].float() / 255
        return lambda: other.fit(mine)

    return normalize, fit


def tiatoolbox(target: np.ndarray) -> Peer:
    """tiatoolbox, which writes ones for the zeros of the image given, so it gets its own."""
    let_torchvision_import()
    import cv2
    from tiatoolbox.tools.stainnorm import MacenkoNormalizer

    cv2.setNumThreads(1)
    peer, other = MacenkoNormalizer(), MacenkoNormalizer()
    peer.fit(target.copy())

    def normalize(image: np.ndarray) -> Call:
        mine = image.copy()
        return lambda: peer.transform(mine)

    def fit(image: np.ndarray) -> Call:
        mine = image.copy()
        return lambda: other.fit(mine)

    return normalize, fit


def as_levels(result: Any) -> np.ndarray:
    """What a package's normalisation returns as grey levels [H, W, 3]: truncated, [0, 1] taken as 0 to 255."""
    image = result[0] if isinstance(result, tuple) else result  # beside the stains
    if isinstance(image, torch.Tensor):
        image = image.detach()
        image = image[0].permute(1, 2, 0) if image.ndim == 4 else image
        image = (image * 255 if image.is_floating_point() and float(image.max()) <= 1 else image).numpy()
    return image.astype(np.uint8)


PEERS: dict[str, Callable[[np.ndarray], Peer]] = {
    "torchstain torch": torchstain_torch,
    "torchstain numpy": torchstain_numpy,
    "stainx": stainx,
    "torch-staintools": torch_staintools,
    "tiatoolbox": tiatoolbox,
}


def peers_of(target: np.ndarray) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that work here, and why each of the others does not."""
    found, missing = {}, {}
    for name, peer in PEERS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = peer(target)
                found[name][0](target)()
        except Exception as error:  # whatever a peer raises, the others are measured
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return found, missing


def let_torchvision_import() -> None:
    """Name two operators that torchvision's Python part expects of its compiled part.

    Its wheels are built for a torch with CUDA, and beside a torch without it the compiled part does not load; the
    functions that stain packages use are Python.
    """
    if "torchvision" in {name.split("::")[0] for name in torch._C._dispatch_get_all_op_names()}:
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)


_KEPT: list[torch.library.Library] = []  # a library takes its operators with it
