"""The ER operators as Python functions: what they support, layouts, fake kernels, autograd.

    channel_moments(x)             mean and biased variance of each channel
    weighted_sum(maps, a, b)       y = sum_l a_l * maps_l + b, then ReLU if asked
    weighted_dot(dy, maps, y)      g = dy where y > 0;  da_l = sum g * maps_l,  db = sum g
    map_dots(z, dy, y, later)      g = dy where y > 0;  sums of z * later_l, z * g and g, in float64

Feature maps are [N, C, H, W], all contiguous or all channels-last. Coefficients, means and sums are per channel ([C],
stacked [L, C]) or per sample and channel ([N, C], [L, N, C]); they are float64 for float64 maps and float32 otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ernet_fast import _backend
from ernet_fast.er.triton import register as triton_operators

# Constants, so that torch.compile need not trace how they are found.
COMPILED = _backend.extension_available()
TRITON = triton_operators.available()
_NO_GUARD = contextlib.nullcontext()


def supports_device(x: Tensor) -> bool:
    """True if operators exist for the device of `x`: compiled ones for the CPU, Triton's for CUDA devices."""
    return (COMPILED and x.device.type == "cpu") or (TRITON and x.device.type == "cuda")


def why_plain(x: Tensor) -> str | None:
    """Why a computation on `x` must be the composition of plain PyTorch operators; None if fused operators do it.

    Transforms that rewrite or differentiate each operator (torch.func, forward-mode AD), tracers, and subclasses of
    tensors know PyTorch's operators and not ours.
    """
    kind = type(x)
    if not isinstance(x, Tensor):
        return f"the input is a {kind.__name__}: symbolic tracing records PyTorch's operators"
    if kind is not Tensor and kind is not nn.Parameter and not kind.__module__.startswith("torch._subclasses"):
        return f"the input is a {kind.__name__}, a subclass of torch.Tensor"
    if not supports_device(x):
        if x.device.type == "cpu":
            return f"no compiled operators: {_backend.why_unavailable()}"
        return f"no operators for {x.device.type} devices" + ("" if x.device.type != "cuda" else " without triton")
    if torch.compiler.is_compiling() and torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return "ONNX knows PyTorch's operators"
    if forward_ad._current_level >= 0:  # the compiler guards on it; ours would drop tangents without a word
        return "forward-mode AD is active"
    if _in_func_transform():
        return "a transform of torch.func (grad, vmap, jvp, ...) is active"
    if not torch.compiler.is_compiling() and torch._C._is_tracing():
        return "torch.jit.trace, or an export to ONNX by it, records PyTorch's operators"
    return None


def _in_func_transform() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


# What torch.compiler.assume_constant_result does, which would import the compiler now.
_in_func_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_first_order(*gradients: Tensor | None) -> None:
    """Raise RuntimeError in a backward pass that fused nodes cannot give: a second derivative, batched gradients."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "ernet_fast: the fused ER stage has no second derivative. Build the model with fused=False (or call "
            "ernet_fast.reference.er_shortcut_sum) where create_graph=True is needed."
        )
    if gradients_are_batched(*gradients):
        raise RuntimeError(
            "ernet_fast: the fused ER stage has no batched gradients (is_grads_batched, vectorize=True, torch.func). "
            "Build the model with fused=False for them."
        )


def gradients_are_batched(*gradients: Tensor | None) -> bool:
    """True if one of a backward pass is a batch of gradients: is_grads_batched, vectorize=True, torch.func."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    for gradient in gradients:
        if gradient is not None:
            keys = torch._C._dispatch_keys(gradient)
            if keys.raw_repr() not in _NOT_BATCHED:
                # a tensor of torch.autograd's own vmap has no other mark than a dispatch key without a name
                if "Batched" in str(keys):
                    return True
                _NOT_BATCHED.add(keys.raw_repr())
    return False


_NOT_BATCHED: set[int] = set()
"""Sets of dispatch keys that were found not to be those of a batched tensor."""


class Node(torch.autograd.Function):
    """An autograd node whose backward pass compiled autograd is to call and not to trace.

    It would trace a node's `backward`, and cannot trace what nodes share by the id of the running pass. So each begins

        if torch.compiler.is_compiling():
            return TheNode.run_untraced(ctx, ...)

    and saves its outputs detached: unpacking an output makes a new tensor each time, and guards of the compiler mistake
    two of them, one after the other at the same address, for one.

    Compiled autograd runs no callbacks at the end of a pass: what a pass over a part of a graph leaves stays with the
    graph then. Ids are not used again, so nothing finds it.
    """

    run_untraced: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.run_untraced = staticmethod(_disable_dynamo(cls.backward))


def acc_dtype(x: Tensor) -> torch.dtype:
    """The dtype of coefficients and sums for maps like `x`."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def layout_of(maps: Sequence[Tensor]) -> torch.memory_format:
    """The layout to compute in: one that all maps have, else that of the last dense map, else contiguous."""
    for some in (maps, *([x] for x in reversed(maps))):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            if all(x.is_contiguous(memory_format=memory_format) for x in some):
                return memory_format
    return torch.contiguous_format


def _autograd_if_needed() -> contextlib.AbstractContextManager[object]:
    """A call without gradients need not pass through the Python of autograd, which outlasts the work on small maps."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _NO_GUARD
    return torch._C._AutoDispatchBelowAutograd()


def channel_moments(x: Tensor, per_sample: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of `x` [N, C, H, W]: two [C], or [N, C] with `per_sample`."""
    with _autograd_if_needed():
        return torch.ops.ernet.channel_moments.default(x, per_sample)


def weighted_sum(maps: Sequence[Tensor], a: Tensor, b: Tensor | None = None, relu: bool = False) -> Tensor:
    """`sum_l a[l] * maps[l] + b` [N, C, H, W], then ReLU if asked; `a` [L, C] or [L, N, C], `b` [C] or [N, C]."""
    with _autograd_if_needed():
        return torch.ops.ernet.weighted_sum.default(maps, a, b, relu)


def weighted_dot(
    dy: Tensor, maps: Sequence[Tensor], y: Tensor | None = None, per_sample: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`da` [L, C], `db` [C] (or [L, N, C], [N, C]) and `g`; without `y`, g is `dy` and the third result is empty."""
    with _autograd_if_needed():
        return torch.ops.ernet.weighted_dot.default(dy, maps, y, per_sample)


def map_dots(
    z: Tensor, dy: Tensor | None, y: Tensor | None, later: Sequence[Tensor], per_sample: bool = False
) -> tuple[Tensor, Tensor]:
    """Sums of z * later_l, then with `dy` those of z * g and of g, [later + 2, C]; and g, empty without `y`.

    The sums are float64, since gradients are small differences of them, and with `per_sample` [later + 2, N, C].
    """
    with _autograd_if_needed():
        return torch.ops.ernet.map_dots.default(z, dy, y, later, per_sample)


def one_value(z: Tensor) -> ValueError:
    """The error for a map z [1, C, 1, 1] that is to be normalised with its own statistics."""
    return ValueError(
        f"the map has shape {tuple(z.shape)}, one value a channel: BatchNorm cannot train on it. "
        "Use a larger batch or image, or eval()."
    )


def dense(x: Tensor) -> Tensor:
    """`x` itself if it is contiguous or channels-last, else a contiguous copy."""
    return x if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def relu_gradient(dy: Tensor, y: Tensor) -> Tensor:
    """The gradient through a ReLU: dy where y > 0 (or NaN), in the layout of both."""
    return torch.ops.aten.threshold_backward.default(dy, y, 0)


def _channels(x: Tensor, per_sample: bool, leading: tuple[int, ...] = ()) -> Tensor:
    sizes = (*leading, x.shape[0], x.shape[1]) if per_sample else (*leading, x.shape[1])
    return x.new_empty(sizes, dtype=acc_dtype(x))


def _moments_fake(x: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    return _channels(x, per_sample), _channels(x, per_sample)


def _sum_fake(maps: list[Tensor], *_: object) -> Tensor:
    return torch.empty_like(maps[0])


def _dot_fake(
    dy: Tensor, maps: list[Tensor], y: Tensor | None = None, per_sample: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    g = dy.new_empty((0,)) if y is None else torch.empty_like(dy)
    return _channels(dy, per_sample, (len(maps),)), _channels(dy, per_sample), g


def _map_dots_fake(
    z: Tensor, dy: Tensor | None, y: Tensor | None, later: list[Tensor], per_sample: bool = False
) -> tuple[Tensor, Tensor]:
    sizes = (len(later) + (0 if dy is None else 2), *z.shape[0 if per_sample else 1 : 2])
    return z.new_empty(sizes, dtype=torch.float64), z.new_empty((0,)) if y is None else torch.empty_like(z)


def _moments_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[0])


def _moments_backward(ctx: Any, dmean: Tensor, dvar: Tensor) -> tuple[Tensor, None]:
    x, mean = ctx.saved_tensors
    count = x.shape[2] * x.shape[3] * (1 if mean.dim() == 2 else x.shape[0])
    k1 = dvar * (2.0 / count)
    return weighted_sum([x], k1.unsqueeze(0), dmean / count - k1 * mean), None


def _sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, a, b, relu = inputs
    ctx.relu, ctx.has_b, ctx.num_maps = relu, b is not None, len(maps)
    ctx.save_for_backward(a, *maps, *([output] if relu else []))


def _sum_backward(ctx: Any, dy: Tensor) -> tuple[list[Tensor], Tensor, Tensor | None, None]:
    a, *maps = ctx.saved_tensors
    y = maps.pop() if ctx.relu else None
    layout = layout_of([*maps] if y is None else [*maps, y])
    dy = dy.contiguous(memory_format=layout)
    da, db, g = weighted_dot(dy, maps, y, a.dim() == 3)
    g = dy if y is None else g
    dmaps = [weighted_sum([g], row.unsqueeze(0)) for row in a]
    return dmaps, da, db if ctx.has_b else None, None


def _dot_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    dy, maps, y, per_sample = inputs
    ctx.per_sample, ctx.has_y = per_sample, y is not None
    ctx.save_for_backward(dy, *maps, *([] if y is None else [y]))


def _dot_backward(ctx: Any, dda: Tensor, ddb: Tensor, dg: Tensor | None) -> tuple[Tensor, list[Tensor], None, None]:
    """With g = m * dy, m = [y > 0]: ddy = m * (sum_l dda_l * x_l + ddb + dg) and dx_l = dda_l * g."""
    dy, *maps = ctx.saved_tensors
    y = maps.pop() if ctx.has_y else None
    layout = layout_of([dy, *maps])
    terms, a = list(maps), dda
    if y is not None and dg is not None:
        terms.append(dg)
        a = torch.cat([dda, torch.ones_like(dda[:1])])
    ddy = weighted_sum([term.contiguous(memory_format=layout) for term in terms], a.contiguous(), ddb.contiguous())
    g = dy
    if y is not None:
        off = y <= 0
        ddy = ddy.masked_fill(off, 0)
        g = dy.masked_fill(off, 0)
    g = g.contiguous(memory_format=layout)
    dmaps = [weighted_sum([g], row.unsqueeze(0).contiguous()) for row in dda]
    return ddy, dmaps, None, None


if TRITON:
    triton_operators.register(define=not COMPILED)
if COMPILED or TRITON:
    torch.library.register_fake("ernet::channel_moments", _moments_fake)
    torch.library.register_fake("ernet::weighted_sum", _sum_fake)
    torch.library.register_fake("ernet::weighted_dot", _dot_fake)
    torch.library.register_fake("ernet::map_dots", _map_dots_fake)
    torch.library.register_autograd("ernet::channel_moments", _moments_backward, setup_context=_moments_setup)
    torch.library.register_autograd("ernet::weighted_sum", _sum_backward, setup_context=_sum_setup)
    torch.library.register_autograd("ernet::weighted_dot", _dot_backward, setup_context=_dot_setup)
