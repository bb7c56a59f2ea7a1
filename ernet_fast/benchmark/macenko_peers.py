"""Macenko normalisation by other packages, each in its own format: the one list for `ernet-fast bench` and bench/.

    torchstain        pip install torchstain
    stainx            pip install --no-deps --no-build-isolation stainx; without nvcc that leaves its CUDA part out
    torch-staintools  pip install --no-deps torch-staintools kornia kornia_rs torchvision
    tiatoolbox        pip install --no-deps tiatoolbox, and what its import asks for; it wants a torch before 2.13
    cuCIM             pip install --no-deps cucim-cu13 (or -cu12), beside cupy

Imports nothing from the package: bench/ loads this file when it times another revision.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        make: the normaliser, for a device of this type.
        arguments: what one call after the other is given for images [B, 3, H, W] uint8; one batch, or each image where
            the package takes one at a time, as its users call it.
        apply: normalises such an argument.
        fitted: fits the normaliser to such an argument; None where the package cannot.
        devices: where it runs.
        gpu_images: images of one call that fill a GPU, or that a loop gets through.
    """

    name: str
    package: str
    make: Callable[[str], Any]
    arguments: Callable[[Tensor], Sequence[Any]]
    apply: Callable[[Any, Any], Any]
    fitted: Callable[[Any, Any], Any] | None = lambda peer, given: peer.fit(given)
    devices: tuple[str, ...] = ("cpu",)
    gpu_images: int = 64

    def normalize(self, images: Tensor, target: Tensor) -> Call:
        """A call that normalises images [B, 3, H, W] uint8 towards a target [3, H, W] on their device, all prepared."""
        (call,) = self.normalize_each([images], target)
        return call

    def normalize_each(self, batches: Iterable[Tensor], target: Tensor) -> list[Call]:
        """A call for each of the batches, by one normaliser."""
        peer = self.make(target.device.type)
        if self.fitted is not None:
            self.fitted(peer, self.arguments(target[None])[0])

        def call_of(given: Sequence[Any]) -> Call:
            return lambda: [self.apply(peer, one) for one in given]

        return [call_of(self.arguments(images)) for images in batches]

    def fit(self, image: Tensor) -> Call:
        """A call that fits one image [3, H, W] uint8."""
        if self.fitted is None:
            raise NotImplementedError(f"{self.name} cannot fit")
        return functools.partial(self.fitted, self.make(image.device.type), self.arguments(image[None])[0])


def planar(image: NDArray[np.uint8]) -> Tensor:
    """[3, H, W] uint8 of [H, W, 3]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _arrays(images: Tensor) -> list[NDArray[np.uint8]]:
    """Copies [H, W, 3] of images [B, 3, H, W]; some packages write to what they are given."""
    return [np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()).copy() for image in images]


def _torchstain(backend: str, device: str) -> Any:
    from torchstain import normalizers

    return normalizers.MacenkoNormalizer(backend=backend)


def _torchstain_fit(peer: Any, given: Any) -> None:
    peer.fit(given)
    if isinstance(given, Tensor):  # it makes its constants on the CPU, and torch adds no tensors of two devices
        peer.HERef, peer.maxCRef = peer.HERef.to(given.device), peer.maxCRef.to(given.device)


def _stainx(device: str) -> Any:
    from stainx import Macenko

    return Macenko(device=device, backend="torch" if device == "cpu" else None)


def _torch_staintools(device: str) -> Any:
    _let_torchvision_import()
    from torch_staintools.normalizer.factory import NormalizerBuilder

    return NormalizerBuilder.build("macenko").to(device)


def _tiatoolbox(device: str) -> Any:
    _let_torchvision_import()
    import cv2
    from tiatoolbox.tools.stainnorm import MacenkoNormalizer

    cv2.setNumThreads(torch.get_num_threads())
    return MacenkoNormalizer()


def _cucim(device: str) -> Any:
    """Towards the stains that it takes by default."""
    from cucim.core.operations.color import normalize_colors_pca

    return normalize_colors_pca


def _cupy(images: Tensor) -> list[Any]:
    import cupy

    return [cupy.asarray(image) for image in images]


_BOTH = ("cpu", "cuda")
PEERS = (
    *(
        MacenkoPeer(
            f"torchstain {backend}", "torchstain", functools.partial(_torchstain, backend), arguments,
            lambda peer, image: peer.normalize(image, stains=False)[0], _torchstain_fit, devices, gpu_images=4,
        )
        for backend, arguments, devices in (("torch", list, _BOTH), ("numpy", _arrays, ("cpu",)))
    ),
    MacenkoPeer("stainx", "stainx", _stainx, lambda images: [images], lambda peer, batch: peer.transform(batch),
                devices=_BOTH),
    MacenkoPeer("torch-staintools", "torch-staintools", _torch_staintools, lambda images: [images.float() / 255],
                lambda peer, batch: peer(batch), devices=_BOTH),
    MacenkoPeer("tiatoolbox", "tiatoolbox", _tiatoolbox, _arrays, lambda peer, image: peer.transform(image)),
    MacenkoPeer("cuCIM", "cucim", _cucim, _cupy, lambda peer, image: peer(image), None, ("cuda",), gpu_images=4),
)  # fmt: skip


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
