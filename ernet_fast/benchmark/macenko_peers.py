"""Macenko normalisation by other packages, each in its own format: the one list for `ernet-fast bench` and bench/.

    torchstain        pip install torchstain
    stainx            pip install --no-deps --no-build-isolation stainx; without nvcc that leaves its CUDA part out
    torch-staintools  pip install --no-deps torch-staintools kornia kornia_rs torchvision
    tiatoolbox        pip install --no-deps tiatoolbox, and what its import asks for; it wants a torch before 2.13
    cuCIM             pip install --no-deps cucim-cu13 (or -cu12), beside cupy

Imports nothing from the package: bench/ loads this file when it times another revision.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Call = Callable[[], Any]


@dataclass(frozen=True)
class MacenkoPeer:
    """Another package's implementation.

    Attributes:
        name: as tables show it.
        package: the distribution whose version is shown.
        normalize: gives a call that normalises images [B, 3, H, W] uint8 towards a target [3, H, W] on their device,
            with everything prepared; it loops where the package takes one image at a time, as its users do.
        fit: gives a call that fits one image [3, H, W] uint8; None where the package cannot.
        devices: where it runs.
        gpu_images: images of one call that fill a GPU, or that a loop gets through.
    """

    name: str
    package: str
    normalize: Callable[[Tensor, Tensor], Call]
    fit: Callable[[Tensor], Call] | None
    devices: tuple[str, ...] = ("cpu",)
    gpu_images: int = 64


def planar(image: NDArray[np.uint8]) -> Tensor:
    """[3, H, W] uint8 of [H, W, 3]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _interleaved_channels(image: Tensor) -> NDArray[np.uint8]:
    """[H, W, 3] of [3, H, W], a copy."""
    return np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()).copy()


def _torchstain(backend: str) -> MacenkoPeer:
    def made() -> Any:
        from torchstain import normalizers

        return normalizers.MacenkoNormalizer(backend=backend)

    def own(image: Tensor) -> Any:
        return _interleaved_channels(image) if backend == "numpy" else image

    def normalize(images: Tensor, target: Tensor) -> Call:
        peer, given = made(), [own(image) for image in images]
        peer.fit(own(target))
        if backend == "torch":  # it makes its constants on the CPU, and torch adds no tensors of two devices
            peer.HERef, peer.maxCRef = peer.HERef.to(images.device), peer.maxCRef.to(images.device)
        return lambda: [peer.normalize(image, stains=False)[0] for image in given]

    def fit(image: Tensor) -> Call:
        peer, given = made(), own(image)
        return lambda: peer.fit(given)

    devices = ("cpu",) if backend == "numpy" else ("cpu", "cuda")
    return MacenkoPeer(f"torchstain {backend}", "torchstain", normalize, fit, devices, gpu_images=4)


def _stainx(device: torch.device) -> Any:
    from stainx import Macenko

    return Macenko(device=device.type, backend="torch" if device.type == "cpu" else None)


def _stainx_normalize(images: Tensor, target: Tensor) -> Call:
    peer = _stainx(images.device)
    peer.fit(target[None])
    return lambda: peer.transform(images)


def _stainx_fit(image: Tensor) -> Call:
    peer = _stainx(image.device)
    return lambda: peer.fit(image[None])


def _torch_staintools(device: torch.device) -> Any:
    _let_torchvision_import()
    from torch_staintools.normalizer.factory import NormalizerBuilder

    return NormalizerBuilder.build("macenko").to(device)


def _torch_staintools_normalize(images: Tensor, target: Tensor) -> Call:
    peer, scaled = _torch_staintools(images.device), images.float() / 255  # it takes images in [0, 1]
    peer.fit(target[None].float() / 255)
    return lambda: peer(scaled)


def _torch_staintools_fit(image: Tensor) -> Call:
    peer, scaled = _torch_staintools(image.device), image[None].float() / 255
    return lambda: peer.fit(scaled)


def _tiatoolbox() -> Any:
    _let_torchvision_import()
    import cv2
    from tiatoolbox.tools.stainnorm import MacenkoNormalizer

    cv2.setNumThreads(torch.get_num_threads())
    return MacenkoNormalizer()


def _tiatoolbox_normalize(images: Tensor, target: Tensor) -> Call:
    peer, given = _tiatoolbox(), [_interleaved_channels(image) for image in images]  # it writes to what it is given
    peer.fit(_interleaved_channels(target))
    return lambda: [peer.transform(image) for image in given]


def _tiatoolbox_fit(image: Tensor) -> Call:
    peer, given = _tiatoolbox(), _interleaved_channels(image)
    return lambda: peer.fit(given)


def _cucim_normalize(images: Tensor, _: Tensor) -> Call:
    """Towards the stains that cuCIM takes by default."""
    import cupy
    from cucim.core.operations.color import normalize_colors_pca

    arrays = [cupy.asarray(image) for image in images]
    return lambda: [normalize_colors_pca(array) for array in arrays]


_BOTH = ("cpu", "cuda")
PEERS = (
    _torchstain("torch"),
    _torchstain("numpy"),
    MacenkoPeer("stainx", "stainx", _stainx_normalize, _stainx_fit, _BOTH),
    MacenkoPeer("torch-staintools", "torch-staintools", _torch_staintools_normalize, _torch_staintools_fit, _BOTH),
    MacenkoPeer("tiatoolbox", "tiatoolbox", _tiatoolbox_normalize, _tiatoolbox_fit),
    MacenkoPeer("cuCIM", "cucim", _cucim_normalize, None, ("cuda",), gpu_images=4),
)


def peers_on(device: torch.device | str) -> list[MacenkoPeer]:
    """The peers that run on a device of this kind, installed or not."""
    return [peer for peer in PEERS if torch.device(device).type in peer.devices]


def working(calls: Mapping[str, Callable[[], Call]]) -> tuple[dict[str, Call], dict[str, str]]:
    """Make and try each call: those that work here, and the reason of each that does not."""
    found: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for name, make in calls.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call = make()
                call()
            found[name] = call
        except Exception as error:  # whatever a peer raises, the others are measured
            missing[name] = reason_of(error)
    return found, missing


def reason_of(error: Exception) -> str:
    """Why a package cannot be measured, in one line."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name} is not installed"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else 'no message'}"


def as_levels(result: Any) -> NDArray[np.int16]:
    """Grey levels [B, H, W, 3] of whatever a package returns for a batch: truncated, [0, 1] taken as 0 to 255."""
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


def _let_torchvision_import() -> None:
    """Name two operators that torchvision's Python part expects of its compiled part, where that does not load.

    Its wheels are built for a torch with CUDA, and beside a torch without it the compiled part does not load; the
    functions that stain packages use are Python.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
    except ImportError:
        return  # the package that needs it says so


_KEPT: list[torch.library.Library] = []  # a library takes its operators with it
