"""Every kernel on the device against the CPU path, on small inputs: what the smoke level and the sanitizers run.

No pytest is needed. The tests marked `gpu` go much further; here each kernel runs in each layout, on odd and ordinary
sizes. Bounds come from the dtype and the length of the sums: sqrt(n) unit roundoffs of float32 a sum of n, times 4
where terms cancel, and one rounding of a result that is stored in a shorter type.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
from collections.abc import Callable, Iterator

import torch
from gpu_case import Ceilings, GpuCase
from record import Row, without_figures
from tissue import tissue
from torch import Tensor

from ernet_fast import _backend

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
SHAPES = [(2, 3, 7, 11), (3, 65, 1, 1), (4, 256, 28, 28), (2, 1030, 7, 7)]
SIZES = [(7, 11), (33, 65), (224, 224), (460, 700)]


def relative(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """||found - expected|| / ||scale||, in double on the CPU; not a number never passes a bound."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    size = (expected if scale is None else scale.cpu().double()).norm().clamp_min(1e-300)
    return float((found - expected).norm() / size)


def bound(dtype: torch.dtype, terms: int, stored: bool = True) -> float:
    """What the relative error of a sum of `terms` products may be."""
    rounding = torch.finfo(dtype).eps if stored else 0.0
    return 4 * torch.finfo(torch.float32).eps * math.sqrt(terms) + rounding


def require(what: str, error: float, limit: float) -> float:
    """The error, if it is within the limit."""
    if not error <= limit:
        raise AssertionError(f"{what}: error {error:.3g}, at most {limit:.3g} expected")
    return error


def maps_of(shape: tuple[int, ...], count: int, dtype: torch.dtype, layout: torch.memory_format) -> list[Tensor]:
    """Random maps on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout) for _ in range(count)]


def er_inputs() -> Iterator[tuple[str, list[Tensor], bool]]:
    """Five maps in every shape, layout and dtype, per channel and per sample."""
    for shape in SHAPES:
        for name, layout in LAYOUTS.items():
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for per_sample in (False, True):
                    yield f"{shape} {name} {dtype} {per_sample}", maps_of(shape, 5, dtype, layout), per_sample


def channel_moments(device: str) -> float:
    """Mean and variance of each channel."""
    from ernet_fast.er import operators

    worst = 0.0
    for what, (x, *_), per_sample in er_inputs():
        expected = operators.channel_moments(x.double(), per_sample)
        found = operators.channel_moments(x.to(device), per_sample)
        limit = bound(x.dtype, x[:, 0].numel(), stored=False)
        size = (expected[0].square() + expected[1]).sqrt()
        worst = max(worst, require(f"mean of {what}", relative(found[0], expected[0], size), limit))
        worst = max(worst, require(f"variance of {what}", relative(found[1], expected[1], size.square()), limit))
    return worst


def weighted_sum(device: str) -> float:
    """Sum of weighted maps and ReLU."""
    from ernet_fast.er import operators

    worst = 0.0
    for what, maps, per_sample in er_inputs():
        sizes = maps[0].shape[:2] if per_sample else maps[0].shape[1:2]
        a, b = torch.randn(5, *sizes), torch.randn(*sizes)
        expected = operators.weighted_sum([x.double() for x in maps], a.double(), b.double(), True)
        found = operators.weighted_sum([x.to(device) for x in maps], a.to(device), b.to(device), True)
        worst = max(worst, require(what, relative(found, expected), bound(maps[0].dtype, 5)))
    return worst


def weighted_dot(device: str) -> float:
    """Dot products of a masked gradient with the maps."""
    from ernet_fast.er import operators

    worst = 0.0
    for what, (dy, y, *maps), per_sample in er_inputs():
        y = y.relu()
        doubled = [x.double() for x in maps]
        expected = operators.weighted_dot(dy.double(), doubled, y.double(), per_sample)
        scale = operators.weighted_dot(dy.double().abs(), [x.abs() for x in doubled], None, per_sample)
        found = operators.weighted_dot(dy.to(device), [x.to(device) for x in maps], y.to(device), per_sample)
        limit = bound(dy.dtype, dy[:, 0].numel(), stored=False)
        worst = max(worst, require(f"da of {what}", relative(found[0], expected[0], scale[0]), limit))
        worst = max(worst, require(f"db of {what}", relative(found[1], expected[1], scale[1]), limit))
        require(f"g of {what}", relative(found[2], expected[2]), 0.0)
    return worst


def stage(device: str) -> float:
    """A stage, fused on the device against the naive composition in float64 on the CPU: values and every gradient."""
    import ernet_fast

    worst = 0.0
    for layout in LAYOUTS.values():
        torch.manual_seed(0)
        naive = ernet_fast.ERStage(24, 32, 4).double()
        fused = copy.deepcopy(naive).to(device).to(memory_format=layout)
        naive.fused = False
        x = torch.randn(5, 24, 14, 11, dtype=torch.float64)
        results = []
        for network, where in ((naive, "cpu"), (fused, device)):
            leaf = x.to(where).contiguous(memory_format=layout).requires_grad_()
            y = network(leaf)
            (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=where).view_as(y)).sum().backward()
            gradients = {name: p.grad for name, p in network.named_parameters()}
            results.append({"output": y, "gradient of the input": leaf.grad, **gradients})
        scale = max(float(value.detach().norm()) for value in results[0].values() if value is not None)
        for name, expected in results[0].items():
            expected = expected.detach()
            # gradients of convolutions before a BatchNorm are differences of large terms: an absolute part of the bound
            error = float((results[1][name].detach().cpu() - expected).norm() / (expected.norm() + 1e-6 * scale))
            worst = max(worst, require(name, error, 1e-7))
    return worst


def images_of_every_kind() -> Iterator[tuple[str, Tensor]]:
    """Every size in both layouts, uint8 and float32."""
    for height, width in SIZES:
        for channels_last in (False, True):
            images = tissue(3, height, width, channels_last)
            for dtype in (torch.uint8, torch.float32):
                yield f"{height} x {width} {'NHWC' if channels_last else 'NCHW'} {dtype}", images.to(dtype)


def macenko_fits(device: str) -> float:
    """Stains of every image, against the CPU's."""
    import ernet_fast  # noqa: F401  (registers the operators)

    worst = 0.0
    for what, images in images_of_every_kind():
        expected = torch.ops.ernet.macenko_fit(images, 240.0, 1.0, 0.15, False)
        found = torch.ops.ernet.macenko_fit(images.to(device), 240.0, 1.0, 0.15, False)
        # of float32 images the logarithm may be fused differently: one unit of fixed point a pixel
        limit = 1e-9 if images.dtype == torch.uint8 else 1e-5
        for a, b in zip(found, expected, strict=True):
            worst = max(worst, require(what, float((a.cpu() - b).abs().nan_to_num(0.0).max()), limit))
    return worst


@contextlib.contextmanager
def asking_for(plan: str) -> Iterator[None]:
    """Calls on a CUDA device take this plan; "" leaves it to the library."""
    set_plan = getattr(_backend.extension(), "set_macenko_plan", lambda plan: None)  # none without CUDA kernels
    set_plan(plan or "auto")
    try:
        yield
    finally:
        set_plan(os.environ.get("ERNET_MACENKO_PLAN", "auto"))


def levels(what: str, found: Tensor, expected: Tensor) -> float:
    """Share of values that differ; one grey level and 0.05 % of the values at most."""
    difference = (found.cpu().int() - expected.int()).abs()
    require(f"grey levels of {what}", float(difference.max()), 1)
    return require(f"values of {what}", float((difference != 0).sum()), max(2, 5e-4 * difference.numel()))


def macenko_reconstruct(device: str) -> float:
    """Images from given stains."""
    from ernet_fast.stain import MacenkoNormalizer, macenko_fit

    target = MacenkoNormalizer().target
    given = [*macenko_fit(tissue(1, 64, 64))[:2], target.stain_matrix, target.max_concentration]
    worst = 0.0
    for what, images in images_of_every_kind():
        expected = torch.ops.ernet.macenko_reconstruct(images, *given, 240.0)
        found = torch.ops.ernet.macenko_reconstruct(images.to(device), *(t.to(device) for t in given), 240.0)
        if images.dtype == torch.uint8:
            worst = max(worst, levels(what, found, expected))
        else:  # exponents below 16 in float32, eight roundings each
            require(what, relative(found, expected), 16 * 2.0**-24 * 8)
    return worst


def macenko_normalize(device: str) -> float:
    """The whole call, a background tile among the images."""
    from ernet_fast.stain import MacenkoNormalizer
    from ernet_fast.stain import macenko_normalize as normalize

    target = MacenkoNormalizer().target
    worst = 0.0
    for what, images in images_of_every_kind():
        if images.dtype != torch.uint8:
            continue
        images = images.clone(memory_format=torch.preserve_format)
        images[1] = 255
        expected, status = normalize(images, target, return_status=True)
        found, on_device = normalize(images.to(device), target, return_status=True)
        require(f"status of {what}", float((on_device.cpu() != status).sum()), 0)
        worst = max(worst, levels(what, found, expected))
    return worst


def macenko_plan(device: str, plan: str) -> float:
    """One plan, asked for: fits, results in the images' layout, augmented images and every kind of network input."""
    from ernet_fast.stain import MacenkoNormalizer, macenko_augment, macenko_fit
    from ernet_fast.stain import macenko_normalize as normalize

    target = MacenkoNormalizer().target
    worst, served = 0.0, 0
    for what, images in images_of_every_kind():
        if images.dtype != torch.uint8:
            continue
        given = images.to(device)
        try:
            with asking_for(plan):
                fit, found = macenko_fit(given), normalize(given, target)
                changed = macenko_augment(given, generator=torch.Generator().manual_seed(0))
                inputs = {dtype: normalize(given, target, output=dtype) for dtype in NETWORK_INPUTS}
        except RuntimeError as error:
            if "does not serve these images" not in str(error):
                raise
            continue
        served += 1
        expected = macenko_fit(images)
        require(f"stains of {what}", relative(fit.stain_matrix, expected.stain_matrix), 30 * 2.0**-24)
        require(f"maxima of {what}", relative(fit.max_concentration, expected.max_concentration), 30 * 2.0**-24)
        worst = max(worst, levels(what, found, normalize(images, target)))
        levels(f"augmented {what}", changed, macenko_augment(images, generator=torch.Generator().manual_seed(0)))
        for dtype, scaled in inputs.items():
            wanted = (found.double() / 255).to(dtype)
            require(f"{dtype} of {what}", relative(scaled, wanted), 2 * torch.finfo(dtype).eps)
    if not served and not plan.startswith("cluster"):  # which devices before compute capability 9.0 have none of
        raise AssertionError(f"plan {plan} served nothing")
    return worst


PLANS = ("streaming", "resident", "cluster2", "cluster8")
NETWORK_INPUTS = (torch.float32, torch.bfloat16, torch.float16)
CHECKS: dict[str, tuple[Callable[[str], float], str]] = {
    "channel_moments": (channel_moments, "relative error"),
    "weighted_sum": (weighted_sum, "relative error"),
    "weighted_dot": (weighted_dot, "relative error"),
    "stage forward and backward": (stage, "relative error"),
    "macenko_fits": (macenko_fits, "absolute error"),
    "macenko_reconstruct": (macenko_reconstruct, "values off by one level"),
    "macenko_normalize": (macenko_normalize, "values off by one level"),
    **{f"macenko {plan}": (functools.partial(macenko_plan, plan=plan), "values off by one level") for plan in PLANS},
}


def run(name: str, _: Ceilings, device: str = "cuda") -> Row:
    """One kernel, in every kind of input."""
    check, measure = CHECKS[name]
    worst = check(device)
    return without_figures(
        "agreement_gpu", name, "pass", f"as the CPU path; largest {measure} {worst:.2g}", worst=worst
    )


def gpu_cases() -> list[GpuCase]:
    """A case a kernel."""
    return [
        GpuCase(name, functools.partial(run, name), importance=0, seconds=15, smoke=True, title=f"{name} = CPU path")
        for name in CHECKS
    ]
