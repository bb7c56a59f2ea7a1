"""The operators `torch.ops.ernet.macenko_*`: fake kernels, the composition that serves CUDA, autograd, and the
fallback.

All images here are [B, 3, H, W], all stains [1 or B, 3, 2] and [1 or B, 2] float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ernet_fast import _backend
from ernet_fast.stain import torch_backend
from ernet_fast.stain.result import MacenkoFit
from ernet_fast.stain.upload import to_device

Fit = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Stains = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # source and target: matrix, maxima

COMPOSED: set[str] = set()
"""Operators that are batched torch operations on CUDA, with compiled kernels inside where there are some."""


def _fit_like(images: torch.Tensor) -> Fit:
    count = images.shape[0]
    return (
        images.new_empty((count, 3, 2), dtype=torch.float64),
        images.new_empty((count, 2), dtype=torch.float64),
        images.new_empty((count,), dtype=torch.int32),
    )


def _network_input_like(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    count, _, height, width = images.shape
    return images.new_empty((count, height, width, 3), dtype=dtype)


def _register() -> None:
    """Fake kernels, and the CUDA implementation of the fit as a composition."""

    @torch.library.register_fake("ernet::macenko_moments")
    def _moments(images: torch.Tensor, Io: float, beta: float, range: float = 255.0) -> torch.Tensor:
        return images.new_empty((images.shape[0], 10), dtype=torch.float64)

    @torch.library.register_fake("ernet::macenko_fit")
    def _fit(images: torch.Tensor, Io: float, alpha: float, beta: float, nearest: bool, range: float = 255.0) -> Fit:
        return _fit_like(images)

    @torch.library.register_fake("ernet::macenko_reconstruct")
    def _reconstruct(
        images: torch.Tensor,
        source_stain: torch.Tensor,
        source_max: torch.Tensor,
        target_stain: torch.Tensor,
        target_max: torch.Tensor,
        Io: float,
        range: float = 255.0,
    ) -> torch.Tensor:
        return torch.empty_like(images)

    @torch.library.register_fake("ernet::macenko_reconstruct_scaled")
    def _reconstruct_scaled(
        images: torch.Tensor,
        source_stain: torch.Tensor,
        source_max: torch.Tensor,
        target_stain: torch.Tensor,
        target_max: torch.Tensor,
        mean: torch.Tensor,
        std: torch.Tensor,
        Io: float,
        dtype: torch.dtype,
        range: float = 255.0,
    ) -> torch.Tensor:
        return _network_input_like(images, dtype)

    @torch.library.register_fake("ernet::macenko_normalize")
    def _normalize(
        images: torch.Tensor,
        target_stain: torch.Tensor,
        target_max: torch.Tensor,
        Io: float,
        alpha: float,
        beta: float,
        nearest: bool,
        identity: bool,
        range: float = 255.0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return (torch.empty_like(images), *_fit_like(images))

    @torch.library.register_fake("ernet::macenko_normalize_scaled")
    def _normalize_scaled(
        images: torch.Tensor,
        target_stain: torch.Tensor,
        target_max: torch.Tensor,
        mean: torch.Tensor,
        std: torch.Tensor,
        Io: float,
        alpha: float,
        beta: float,
        nearest: bool,
        identity: bool,
        dtype: torch.dtype,
        range: float = 255.0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return (_network_input_like(images, dtype), *_fit_like(images))

    _register_cuda_only()
    compositions: dict[str, Callable[..., Any]] = {
        "macenko_fit": torch_backend.macenko_fit,
        "macenko_normalize": torch_backend.macenko_normalize,
    }
    for name, composition in compositions.items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"ernet::{name}", "CUDA"):
            torch.library.impl(f"ernet::{name}", "CUDA", composition)
            COMPOSED.add(name)


def _register_cuda_only() -> None:
    """Fake kernels of the operators that only CUDA has."""

    @torch.library.register_fake("ernet::macenko_change")
    def _change(
        images: torch.Tensor,
        source_stain: torch.Tensor,
        source_max: torch.Tensor,
        gain: torch.Tensor,
        shift: torch.Tensor,
        Io: float,
        range: float = 255.0,
    ) -> torch.Tensor:
        return torch.empty_like(images)

    @torch.library.register_fake("ernet::macenko_separate")
    def _separate(
        images: torch.Tensor,
        source_stain: torch.Tensor,
        source_max: torch.Tensor,
        drawn_stain: torch.Tensor,
        drawn_max: torch.Tensor,
        scaled: bool,
        Io: float,
        range: float = 255.0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        count, _, height, width = images.shape
        concentrations = images.new_empty((count, 2, height, width), dtype=torch.float32)
        return torch.empty_like(images), torch.empty_like(images), concentrations

    @torch.library.register_fake("ernet::macenko_augment")
    def _augment(
        images: torch.Tensor,
        reference_stain: torch.Tensor,
        reference_max: torch.Tensor,
        gain: torch.Tensor,
        shift: torch.Tensor,
        Io: float,
        alpha: float,
        beta: float,
        nearest: bool,
        identity: bool,
        range: float = 255.0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return (torch.empty_like(images), *_fit_like(images))


if _backend.extension_available():
    _register()


def _compiled_for(images: torch.Tensor) -> bool:
    """True if compiled code serves images of this device."""
    if not _backend.extension_available():
        if images.device.type == "cpu":
            _backend.warn_fallback_once()
        return False
    if images.device.type == "cpu":
        return True
    return (
        images.dtype != torch.float64 and images.is_cuda and torch_backend.why_no_kernels(images.device.index) is None
    )


def _composed(images: torch.Tensor) -> bool:
    """True if batched torch operations fit images of this device where no compiled code does."""
    return images.device.type != "cpu"


def supported(images: torch.Tensor, *, like_result: bool = False) -> torch.Tensor:
    """`images` in a dtype and memory layout that the operators take: copied only if strided, float16 or bfloat16.

    With `like_result` planes follow each other as a result's do: rows cut out of planar images are copied.
    """
    if images.dtype in (torch.float16, torch.bfloat16):
        images = images.float()
    if images.is_contiguous():
        return images
    _, _, height, width = images.shape
    planar = (width == 1 or images.stride(3) == 1) and (height == 1 or images.stride(2) == width)
    if like_result and images.stride(1) != height * width:
        planar = False
    if planar or images.numel() == 0:
        return images
    interleaved = images.stride(1) == 1 and (width == 1 or images.stride(3) == 3)
    if interleaved and (height == 1 or images.stride(2) == 3 * width):
        return images
    last = images.stride(1) < images.stride(3)
    return images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def fit(images: torch.Tensor, Io: float, alpha: float, beta: float, nearest: bool, range: float) -> MacenkoFit:
    """Fit every image, by the best backend there is."""
    images = images.detach()
    if _compiled_for(images):
        return MacenkoFit(*torch.ops.ernet.macenko_fit(supported(images), Io, alpha, beta, nearest, range))
    if not _composed(images):
        from ernet_fast import reference

        percentile = "nearest" if nearest else "linear"
        return reference.macenko_fit(
            images, Io=Io, alpha=alpha, beta=beta, percentile=percentile, range=range, layout="CHW"
        )
    return MacenkoFit(*torch_backend.macenko_fit(supported(images), Io, alpha, beta, nearest, range))


def fit_inside(
    images: torch.Tensor,
    inside: torch.Tensor,
    Io: float,
    alpha: float,
    beta: float,
    nearest: bool,
    range: float,
) -> MacenkoFit | None:
    """Fit the pixels `inside` [B, H W] of every image at once, without waiting for the device; None on the CPU."""
    if not _composed(images):
        return None
    return MacenkoFit(*torch_backend.macenko_fit(supported(images.detach()), Io, alpha, beta, nearest, range, inside))


def reconstruct(images: torch.Tensor, source: MacenkoFit, target: MacenkoFit, Io: float, range: float) -> torch.Tensor:
    """Replace the stains of `source` by those of `target`; differentiable for floating-point images."""
    stains = (
        _as_argument(source.stain_matrix, images),
        _as_argument(source.max_concentration, images),
        _as_argument(target.stain_matrix, images),
        _as_argument(target.max_concentration, images),
    )
    wanted = images.is_floating_point() and (images.requires_grad or any(part.requires_grad for part in stains))
    if torch.is_grad_enabled() and wanted:
        matrix = torch_backend.reconstruction_matrix(*stains)
        return _Reconstruct.apply(images, matrix, stains, Io, range)
    return _reconstruct(images, stains, Io, range)


def _as_argument(part: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    if part.dtype != torch.float64 or part.device != images.device:
        part = to_device(part, images.device, torch.float64)
    return part.contiguous()


def _reconstruct(images: torch.Tensor, stains: Stains, Io: float, range: float) -> torch.Tensor:
    images = images.detach()
    source_stain, source_max, target_stain, target_max = (part.detach() for part in stains)
    if _compiled_for(images):
        out = torch.ops.ernet.macenko_reconstruct(
            supported(images, like_result=True), source_stain, source_max, target_stain, target_max, Io, range
        )
        return out.to(images.dtype)
    return torch_backend.macenko_reconstruct(images, source_stain, source_max, target_stain, target_max, Io, range)


def reconstruct_scaled(
    images: torch.Tensor,
    source: MacenkoFit,
    target: MacenkoFit,
    mean: torch.Tensor,
    std: torch.Tensor,
    Io: float,
    range: float,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """(I' / range - mean) / std as [B, 3, H, W] in channels-last memory; None where no operator serves."""
    if images.dtype in (torch.float16, torch.bfloat16) or not _compiled_for(images):
        return None  # half-precision images are reconstructed in float32, but rounded before they are scaled
    stains = [_as_argument(part, images).detach() for fit in (source, target) for part in fit[:2]]
    out = torch.ops.ernet.macenko_reconstruct_scaled(supported(images.detach()), *stains, mean, std, Io, dtype, range)
    return out.permute(0, 3, 1, 2)


class _Reconstruct(torch.autograd.Function):
    """I' = min(Io exp(M ln((I + 1) / Io)), 255), with gradients to I and M where the value is not clipped."""

    @staticmethod
    def forward(
        ctx: Any,
        images: torch.Tensor,
        matrix: torch.Tensor,
        stains: Stains,
        Io: float,
        range: float,
    ) -> torch.Tensor:
        out = _reconstruct(images, stains, Io, range)
        ctx.save_for_backward(images, matrix, out)
        ctx.Io, ctx.range = Io, range
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, matrix, out = ctx.saved_tensors
        work = torch.promote_types(images.dtype, torch.float32)
        # dI'/d(M OD) = -I', and 0 where clipped at 255.
        weighted = dout.to(work) * out.to(work)
        weighted = weighted.masked_fill(out >= ctx.range, 0)
        light = images.to(work) * (255 / ctx.range) + 1
        dimages = dmatrix = None
        if ctx.needs_input_grad[0]:
            # dOD/dI = -1 / (I + 1), in the caller's units.
            dimages = torch.einsum("bchw,bck->bkhw", weighted, matrix.to(work).expand(len(images), 3, 3))
            dimages = (dimages / light * (255 / ctx.range)).to(images.dtype)
        if ctx.needs_input_grad[1]:
            log_light = (light / ctx.Io).log()
            dmatrix = torch.einsum("bchw,bkhw->bck", weighted.double(), log_light.double())
            dmatrix = dmatrix.sum_to_size(matrix.shape)
        return dimages, dmatrix, None, None, None


def normalize(
    images: torch.Tensor,
    target: MacenkoFit,
    Io: float,
    alpha: float,
    beta: float,
    nearest: bool,
    identity: bool,
    range: float,
) -> tuple[torch.Tensor, MacenkoFit] | None:
    """Fit and reconstruct in one operator; None where that operator does not serve."""
    stain, maximum, _ = target
    if images.requires_grad or stain.requires_grad or maximum.requires_grad or not _compiled_for(images):
        return None
    stains = _as_argument(stain, images), _as_argument(maximum, images)
    pixels = supported(images, like_result=True)
    out, *fitted = torch.ops.ernet.macenko_normalize(pixels, *stains, Io, alpha, beta, nearest, identity, range)
    return (out if out.dtype == images.dtype else out.to(images.dtype)), MacenkoFit(*fitted)


def normalize_scaled(
    images: torch.Tensor,
    target: MacenkoFit,
    mean: torch.Tensor,
    std: torch.Tensor,
    Io: float,
    alpha: float,
    beta: float,
    nearest: bool,
    identity: bool,
    range: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, MacenkoFit] | None:
    """Fit and `reconstruct_scaled` in one operator; None where that operator does not serve."""
    stains_grad = target.stain_matrix.requires_grad or target.max_concentration.requires_grad
    half = images.dtype in (torch.float16, torch.bfloat16)  # rounded before they are scaled
    if images.requires_grad or stains_grad or half or not _compiled_for(images):
        return None
    stains = (_as_argument(part, images).detach() for part in target[:2])
    out, *fitted = torch.ops.ernet.macenko_normalize_scaled(
        supported(images), *stains, mean, std, Io, alpha, beta, nearest, identity, dtype, range
    )
    return out.permute(0, 3, 1, 2), MacenkoFit(*fitted)


def served_on_cuda(images: torch.Tensor) -> bool:
    """True if `change`, `augment` and `separate` serve these images."""
    exact = images.dtype in (torch.uint8, torch.float32) and not images.requires_grad
    return exact and images.is_cuda and _compiled_for(images)


def change(
    images: torch.Tensor, source: MacenkoFit, gain: torch.Tensor, shift: torch.Tensor, Io: float, range: float
) -> torch.Tensor:
    """I' = Io exp(-HE (gain C + shift)), with `gain` and `shift` [B, 2] float64; where `served_on_cuda`."""
    arguments = (_as_argument(part, images).detach() for part in (*source[:2], gain, shift))
    return torch.ops.ernet.macenko_change(supported(images), *arguments, Io, range)


def augment(
    images: torch.Tensor,
    reference: MacenkoFit,
    gain: torch.Tensor,
    shift: torch.Tensor,
    Io: float,
    alpha: float,
    beta: float,
    nearest: bool,
    identity: bool,
    range: float,
) -> tuple[torch.Tensor, MacenkoFit]:
    """Fit and `change` in one operator, with the stains of `reference` where there is no fit."""
    arguments = (_as_argument(part, images).detach() for part in (*reference[:2], gain, shift))
    out, *fitted = torch.ops.ernet.macenko_augment(
        supported(images), *arguments, Io, alpha, beta, nearest, identity, range
    )
    return out, MacenkoFit(*fitted)


def separate(
    images: torch.Tensor, source: MacenkoFit, drawn: MacenkoFit, scaled: bool, Io: float, range: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images of haematoxylin and of eosin with the stains `drawn`, and concentrations [B, 2, H, W] of `source`."""
    arguments = (_as_argument(part, images).detach() for part in (*source[:2], *drawn[:2]))
    return torch.ops.ernet.macenko_separate(supported(images), *arguments, scaled, Io, range)
