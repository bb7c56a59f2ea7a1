"""Macenko normalisation by other packages, each in its own format and fitted to the same target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernet_fast.benchmark.question import Contestant

Image = NDArray[np.uint8]


def planar(image: Image) -> Tensor:
    """[3, H, W] uint8 of [H, W, 3]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _torchstain(backend: str, images: list[Image], target: Image, device: torch.device) -> Callable[[], Any]:
    from torchstain import normalizers

    peer = normalizers.MacenkoNormalizer(backend=backend)

    def own(image: Image) -> Any:
        return image if backend == "numpy" else planar(image).to(device)

    peer.fit(own(target))
    given = [own(image) for image in images]
    return lambda: [peer.normalize(image, stains=False)[0] for image in given]


def _stainx(images: list[Image], target: Image, device: torch.device) -> Callable[[], Any]:
    from stainx import Macenko

    peer = Macenko(device=device.type, backend="torch" if device.type == "cpu" else None)
    peer.fit(planar(target)[None].to(device))
    batch = torch.stack([planar(image) for image in images]).to(device)
    return lambda: peer.transform(batch)


def _torch_staintools(images: list[Image], target: Image, device: torch.device) -> Callable[[], Any]:
    from torch_staintools.normalizer.factory import NormalizerBuilder

    peer = NormalizerBuilder.build("macenko").to(device)
    peer.fit(planar(target)[None].to(device).float() / 255)
    batch = torch.stack([planar(image) for image in images]).to(device).float() / 255
    return lambda: peer(batch)


def _tiatoolbox(images: list[Image], target: Image) -> Callable[[], Any]:
    from tiatoolbox.tools.stainnorm import MacenkoNormalizer

    peer = MacenkoNormalizer()
    given = [image.copy() for image in images]  # it writes to the image that it is given
    peer.fit(target.copy())
    return lambda: [peer.transform(image) for image in given]


def stain_peers(images: list[Image], target: Image, device: torch.device) -> list[Contestant]:
    """The packages, whether installed or not: those that are not say so when they prepare.

    Args:
        images: [H, W, 3] uint8, all of one size.
        target: [H, W, 3] uint8, to whose stains all are fitted.
        device: packages that can use it do; those that cannot are left out for any other than the CPU.
    """
    found = [
        Contestant("torchstain (torch)", lambda: _torchstain("torch", images, target, device), "torchstain"),
        Contestant("stainx", lambda: _stainx(images, target, device), "stainx"),
        Contestant("torch-staintools", lambda: _torch_staintools(images, target, device), "torch-staintools"),
    ]
    if device.type == "cpu":
        found += [
            Contestant("torchstain (numpy)", lambda: _torchstain("numpy", images, target, device), "torchstain"),
            Contestant("tiatoolbox", lambda: _tiatoolbox(images, target), "tiatoolbox"),
        ]
    return found


def as_levels(result: Any) -> NDArray[np.int16]:
    """Grey levels [B, H, W, 3] of whatever a package returns for a batch."""
    if isinstance(result, list | tuple):
        return np.concatenate([as_levels(one) for one in result])
    if isinstance(result, Tensor):
        array = result.detach().cpu().numpy()
        if result.is_floating_point() and array.size and array.max() <= 1.0:
            array = array * 255
    else:
        array = np.asarray(result)
    array = array[None] if array.ndim == 3 else array
    if array.shape[-1] != 3:
        array = array.transpose(0, 2, 3, 1)
    return array.astype(np.int16)
