"""Other packages' Macenko normalisation on a CUDA device, each in its own format and fitted to the same target.

    torchstain        pip install torchstain
    stainx            pip install --no-deps --no-build-isolation stainx, with nvcc for its CUDA part
    torch-staintools  pip install --no-deps torch-staintools kornia kornia_rs torchvision
    cuCIM             pip install --no-deps cucim-cu13 (or -cu12), beside cupy

A peer is a function of the target image [3, H, W] uint8 and of images [B, 3, H, W] uint8, both on the device; it
returns a call that normalises all of them, with everything prepared. Where a package takes one image at a time the call
loops, as its users do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from macenko_peers import let_torchvision_import
from torch import Tensor

Call = Callable[[], Any]


def torchstain(target: Tensor, images: Tensor) -> Call:
    """Torchstain's torch backend."""
    from torchstain import normalizers

    peer = normalizers.MacenkoNormalizer(backend="torch")
    peer.fit(target)
    # It makes its constants on the CPU, and torch adds no tensors of two devices.
    peer.HERef, peer.maxCRef = peer.HERef.to(images.device), peer.maxCRef.to(images.device)
    return lambda: [peer.normalize(image, stains=False) for image in images]


def stainx(target: Tensor, images: Tensor) -> Call:
    """Stainx with the backend that it chooses."""
    from stainx import Macenko

    peer = Macenko(device=images.device.type)
    peer.fit(target[None])
    return lambda: peer.transform(images)


def torch_staintools(target: Tensor, images: Tensor) -> Call:
    """Torch-staintools with its defaults; it takes images in [0, 1]."""
    let_torchvision_import()
    from torch_staintools.normalizer.factory import NormalizerBuilder

    peer = NormalizerBuilder.build("macenko").to(images.device)
    peer.fit(target[None].float() / 255)
    scaled = images.float() / 255
    return lambda: peer(scaled)


def cucim(target: Tensor, images: Tensor) -> Call:
    """The stain normalisation of cuCIM, one image at a time, towards the stains that it takes by default."""
    import cupy
    from cucim.core.operations.color import normalize_colors_pca

    arrays = [cupy.asarray(image) for image in images]
    return lambda: [normalize_colors_pca(array) for array in arrays]


PEERS: dict[str, Callable[[Tensor, Tensor], Call]] = {
    "torchstain": torchstain,
    "stainx": stainx,
    "torch-staintools": torch_staintools,
    "cuCIM": cucim,
}
IMAGES = {"torchstain": 4, "stainx": 64, "torch-staintools": 64, "cuCIM": 4}
"""How many images a call gets: enough to fill the device where a package takes batches."""


def peers_of(target: Tensor, images: Tensor) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls of the peers that work here, and why each of the others does not."""
    found: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for name, peer in PEERS.items():
        try:
            call = peer(target, images[: IMAGES[name]])
            call()
            if images.is_cuda:
                torch.cuda.synchronize()
            found[name] = call
        except Exception as error:  # whatever a peer raises, the others are measured
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"[
                :200
            ]
    return found, missing
