"""The operators `torch.ops.ernet.macenko_*`: fake kernels, the composition that serves CUDA without kernels, autograd,
and the fallback.

All images here are [B, 3, H, W], all stains [1 or B, 3, 2] and [1 or B, 2] float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd import forward_ad

from ernet_fast import _backend
from ernet_fast.stain import torch_backend
from ernet_fast.stain.network_output import NetworkOutput, scale
from ernet_fast.stain.options import Options
from ernet_fast.stain.result import MacenkoFit
from ernet_fast.stain.upload import to_device

Fit = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
HALF = (torch.float16, torch.bfloat16)
_EXTENSION = _backend.extension_available()  # once, where torch.compile does not trace

COMPOSED: set[str] = set()
"""Operators that are batched torch operations on CUDA, where the package was built without kernels for it."""


def fit_like(images: torch.Tensor, count: int) -> Fit:
    """Uninitialised results of a fit of `count` images, on their device."""
    return (
        images.new_empty((count, 3, 2), dtype=torch.float64),
        images.new_empty((count, 2), dtype=torch.float64),
        images.new_empty((count,), dtype=torch.int32),
    )


def _result_like(images: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None:
        return torch.empty_like(images)
    count, _, height, width = images.shape
    return images.new_empty((count, height, width, 3), dtype=dtype)


def _register() -> None:
    """Fake kernels, and the CUDA implementation of the fit as a composition."""
    like = torch.empty_like

    def concentrations(images: torch.Tensor) -> torch.Tensor:
        return images.new_empty((images.shape[0], 2, *images.shape[2:]), dtype=torch.float32)

    fakes: dict[str, Callable[..., Any]] = {
        "fit": lambda x, *rest, **named: fit_like(x, len(x)),
        "reconstruct": lambda x, *rest, dtype=None, **named: _result_like(x, dtype),
        "reconstruct_stains": lambda x, *rest, **named: (like(x), like(x), like(x)),
        "normalize": lambda x, *rest, dtype=None, **named: (_result_like(x, dtype), *fit_like(x, len(x))),
        "change": lambda x, *rest, **named: like(x),
        "augment": lambda x, *rest, **named: (like(x), *fit_like(x, len(x))),
        "separate": lambda x, *rest, **named: (like(x), like(x), concentrations(x)),
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"ernet::macenko_{name}", fake)

    for name in ("macenko_fit", "macenko_normalize"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"ernet::{name}", "CUDA"):
            torch.library.impl(f"ernet::{name}", "CUDA", getattr(torch_backend, name))
            COMPOSED.add(name)


if _EXTENSION:
    _register()


def _is_compiled_for(images: torch.Tensor) -> bool:
    """True if compiled code supports images of this device."""
    if not _EXTENSION:
        if images.is_cpu:
            _backend.warn_fallback_once()
        return False
    if images.is_cpu:
        return True
    return (
        images.dtype != torch.float64 and images.is_cuda and torch_backend.why_no_kernels(images.device.index) is None
    )


def is_composed(images: torch.Tensor) -> bool:
    """True if batched torch operations fit images of this device, also inside masks, where no compiled code does."""
    return images.device.type != "cpu"


def is_differentiated(images: torch.Tensor, *stains: torch.Tensor) -> bool:
    """True if a derivative of the result may be taken: by autograd, forward-mode AD, or a transform of torch.func."""
    if not images.is_floating_point():
        return False
    tensors = (images, *stains)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    if torch.compiler.is_compiling():
        return False
    return any(
        torch._C._functorch.is_functorch_wrapped_tensor(tensor) or forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
    )


def supported(images: torch.Tensor, *, like_result: bool = False) -> torch.Tensor:
    """`images` in a dtype and memory layout that the operators take: copied only if strided, float16 or bfloat16.

    With `like_result` planes follow each other as a result's do: rows cut out of planar images are copied.
    """
    if images.dtype in HALF:
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


def _arguments(images: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Float64 on the images' device, contiguous."""
    device, float64 = images.device, torch.float64
    return [
        (part if part.dtype == float64 and part.device == device else to_device(part, device, float64)).contiguous()
        for part in tensors
    ]


def _constant(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` without what would be differentiated; itself where there is nothing."""
    return tensor.detach() if tensor.requires_grad or forward_ad._current_level >= 0 else tensor


def fit(images: torch.Tensor, options: Options, inside: torch.Tensor | None = None) -> MacenkoFit:
    """Fit every image, or its pixels `inside` [B, H W], which the CPU does not take; no gradient flows."""
    images = images.detach()
    numbers = options.Io, options.alpha, options.beta, options.nearest, options.range
    if inside is None and _is_compiled_for(images):
        return MacenkoFit(*torch.ops.ernet.macenko_fit.default(supported(images), *numbers))
    if is_composed(images):
        return MacenkoFit(*torch_backend.macenko_fit(supported(images), *numbers, inside))
    assert inside is None
    from ernet_fast.reference.macenko import fit_images

    return fit_images(images, options)


def reconstruct(
    images: torch.Tensor, source: MacenkoFit, target: MacenkoFit, options: Options, network: NetworkOutput | None = None
) -> torch.Tensor:
    """Replace the stains of `source` by those of `target`; differentiable for floating-point images.

    For a network (I' / range - mean) / std as [B, 3, H, W] in channels-last memory.
    """
    stains = _arguments(images, *source[:2], *target[:2])
    # half-precision images are reconstructed in float32, but rounded before they are scaled
    if network is not None and images.dtype not in HALF and is_one_operator(images, *stains):
        pixels, plain = supported(images.detach()), [part.detach() for part in stains]
        named = network._asdict()
        out = torch.ops.ernet.macenko_reconstruct.default(pixels, *plain, options.Io, options.range, **named)
        return out.permute(0, 3, 1, 2)
    out = _transformed("macenko_reconstruct", images, stains, options)
    return out if network is None else scale(out, network, options.range)


def _transformed(name: str, images: torch.Tensor, stains: list[torch.Tensor], options: Options) -> torch.Tensor:
    """What the operator `name` computes, in the dtype of `images`; differentiable."""
    kernel = partial(_by_kernel, name, options)
    if not is_differentiated(images, *stains):
        return kernel(images.detach(), *(part.detach() for part in stains))
    matrix, tint = _exponent(name, stains)
    shift = None if tint is None else -tint
    apply = _Transform.apply if torch.compiler.is_compiling() else _TransformForward.apply
    return apply(images, matrix, shift, options.Io, options.range, kernel, *stains)


def _by_kernel(name: str, options: Options, images: torch.Tensor, *stains: torch.Tensor) -> torch.Tensor:
    if _is_compiled_for(images):
        pixels = supported(images, like_result=True)
        return getattr(torch.ops.ernet, name).default(pixels, *stains, options.Io, options.range).to(images.dtype)
    return torch_backend.transform(images, *_exponent(name, stains), options.Io, options.range)


def _exponent(name: str, stains: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    if name == "macenko_reconstruct":
        return torch_backend.reconstruction_matrix(*stains), None
    return torch_backend.change_matrix(*stains)


def reconstruct_stains(
    images: torch.Tensor, source: MacenkoFit, target: MacenkoFit, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reconstruct` with both stains of `target`, with haematoxylin alone and with eosin alone: in one pass over the
    images where no derivative is wanted and compiled code supports them.
    """
    stains = _arguments(images, *source[:2], *target[:2])
    if is_one_operator(images, *stains):
        pixels, plain = supported(images.detach(), like_result=True), [part.detach() for part in stains]
        both, h, e = torch.ops.ernet.macenko_reconstruct_stains.default(pixels, *plain, options.Io, options.range)
        return both.to(images.dtype), h.to(images.dtype), e.to(images.dtype)
    return reconstruct(images, source, target, options), *stains_alone(images, source, target, options)


def stains_alone(
    images: torch.Tensor, source: MacenkoFit, drawn: MacenkoFit, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reconstruct` with haematoxylin of `drawn` alone and with eosin alone: the other's concentration is zero."""
    h, e = drawn.max_concentration.unbind(dim=1)
    only_h, only_e = torch.stack([h, torch.zeros_like(h)], dim=1), torch.stack([torch.zeros_like(e), e], dim=1)
    return (
        reconstruct(images, source, drawn._replace(max_concentration=only_h), options),
        reconstruct(images, source, drawn._replace(max_concentration=only_e), options),
    )


def change(
    images: torch.Tensor, source: MacenkoFit, gain: torch.Tensor, shift: torch.Tensor, options: Options
) -> torch.Tensor:
    """I' = Io exp(-HE (gain C + shift)), with `gain` and `shift` [B, 2] float64; differentiable as `reconstruct`."""
    return _transformed("macenko_change", images, _arguments(images, *source[:2], gain, shift), options)


class _Transform(torch.autograd.Function):
    """I' = min(Io exp(M ln((I + 1) / Io) + s), 255), with derivatives to I, M [B, 3, 3] and s [B, 3] where it is not
    clipped. `kernel(images, *stains)` computes it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        images: torch.Tensor,
        matrix: torch.Tensor,
        shift: torch.Tensor | None,
        Io: float,
        range: float,
        kernel: Callable[..., torch.Tensor],
        *stains: torch.Tensor,
    ) -> torch.Tensor:
        return kernel(images, *stains)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        images, matrix, shift, ctx.Io, ctx.range, _, *stains = inputs
        ctx.shift_shape, ctx.others = None if shift is None else shift.shape, 3 + len(stains)
        ctx.save_for_backward(images, matrix, output)
        ctx.save_for_forward(images, matrix, output)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, matrix, out = ctx.saved_tensors
        work = torch.promote_types(images.dtype, torch.float32)
        # dI'/d(exponent) = I', and 0 where clipped at 255.
        weighted = (dout.to(work) * out.to(work)).masked_fill(out >= ctx.range, 0)
        intensity = images.to(work) * (255 / ctx.range) + 1
        dimages = dmatrix = dshift = None
        if ctx.needs_input_grad[0]:
            # d(log intensity)/dI = 1 / (I + 1), in the caller's units.
            dimages = torch.einsum("bchw,bck->bkhw", weighted, matrix.to(work).expand(len(images), 3, 3))
            dimages = (dimages / intensity * (255 / ctx.range)).to(images.dtype)
        if ctx.needs_input_grad[1]:
            logarithm = (intensity / ctx.Io).log()
            dmatrix = torch.einsum("bchw,bkhw->bck", weighted.double(), logarithm.double())
            dmatrix = dmatrix.sum_to_size(matrix.shape)
        if ctx.shift_shape is not None and ctx.needs_input_grad[2]:
            dshift = weighted.double().sum(dim=(2, 3)).sum_to_size(ctx.shift_shape)
        return (dimages, dmatrix, dshift, *[None] * ctx.others)


class _TransformForward(_Transform):
    """With forward-mode AD, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx: Any, dimages: Any, dmatrix: Any, dshift: Any, *others: Any) -> torch.Tensor:
        images, matrix, out = ctx.saved_tensors
        work = torch.promote_types(images.dtype, torch.float32)
        intensity = images.to(work) * (255 / ctx.range) + 1
        exponent = torch.zeros_like(intensity)
        if dimages is not None:
            direction = dimages.to(work) * (255 / ctx.range) / intensity
            exponent = exponent + torch.einsum("bck,bkhw->bchw", matrix.to(work).expand(len(images), 3, 3), direction)
        if dmatrix is not None:
            logarithm = (intensity / ctx.Io).log()
            exponent = exponent + torch.einsum("bck,bkhw->bchw", dmatrix.to(work).expand(len(images), 3, 3), logarithm)
        if dshift is not None:
            exponent = exponent + dshift.to(work)[:, :, None, None]
        return (out.to(work) * exponent).masked_fill(out >= ctx.range, 0).to(images.dtype)


def normalize(
    images: torch.Tensor, target: MacenkoFit, options: Options, network: NetworkOutput | None = None
) -> tuple[torch.Tensor, MacenkoFit] | None:
    """Fit and `reconstruct` in one operator; None where that operator does not apply."""
    if not is_one_operator(images, *target[:2]) or (network is not None and images.dtype in HALF):
        return None
    stains = [_constant(part) for part in _arguments(images, *target[:2])]
    o = options
    numbers = o.Io, o.alpha, o.beta, o.nearest, o.identity, o.range
    if network is not None:
        out, *fitted = torch.ops.ernet.macenko_normalize.default(
            supported(images), *stains, *numbers, **network._asdict()
        )
        return out.permute(0, 3, 1, 2), MacenkoFit(*fitted)
    out, *fitted = torch.ops.ernet.macenko_normalize.default(supported(images, like_result=True), *stains, *numbers)
    return (out if out.dtype == images.dtype else out.to(images.dtype)), MacenkoFit(*fitted)


def normalize_bytes(images: torch.Tensor, target: MacenkoFit, options: Options) -> torch.Tensor | None:
    """The images of `normalize` for 8-bit ones on the CPU and a target as `fit` returns it there; None for all others,
    and where the operator refuses them.
    """
    stain, maximum, _ = target
    if not (_EXTENSION and images.dtype == torch.uint8 and images.is_cpu) or forward_ad._current_level >= 0:
        return None
    for part in (stain, maximum):
        if type(part) is not torch.Tensor or not part.is_cpu or part.requires_grad:
            return None
    o, pixels = options, supported(images, like_result=True)
    numbers = o.Io, o.alpha, o.beta, o.nearest, o.identity, o.range
    try:
        out, *_ = torch.ops.ernet.macenko_normalize.default(pixels, stain, maximum, *numbers)
    except RuntimeError:  # of stains that are not finite, or in another dtype or shape
        return None
    return out


def augment(
    images: torch.Tensor, reference: MacenkoFit, gain: torch.Tensor, shift: torch.Tensor, options: Options
) -> tuple[torch.Tensor, MacenkoFit] | None:
    """Fit and `change` in one operator, with the stains of `reference` where there is no fit; None where it does not
    apply.
    """
    if not is_one_operator(images):
        return None
    o = options
    arguments = _arguments(images, *reference[:2], gain, shift)
    numbers = o.Io, o.alpha, o.beta, o.nearest, o.identity, o.range
    out, *fitted = torch.ops.ernet.macenko_augment.default(supported(images, like_result=True), *arguments, *numbers)
    return out.to(images.dtype), MacenkoFit(*fitted)


def is_one_operator(images: torch.Tensor, *stains: torch.Tensor) -> bool:
    """True if one operator fits and reconstructs these images."""
    return not is_differentiated(images, *stains) and _is_compiled_for(images)


def separate(
    images: torch.Tensor, source: MacenkoFit, drawn: MacenkoFit, scaled: bool, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Images of haematoxylin and of eosin with the stains `drawn`, and concentrations [B, 2, H, W] of `source`, in one
    operator; None where it does not apply, as on the CPU.
    """
    exact = images.dtype in (torch.uint8, torch.float32) and images.is_cuda
    if not exact or not is_one_operator(images, *source[:2], *drawn[:2]):
        return None
    arguments = [part.detach() for part in _arguments(images, *source[:2], *drawn[:2])]
    return torch.ops.ernet.macenko_separate.default(supported(images), *arguments, scaled, options.Io, options.range)
