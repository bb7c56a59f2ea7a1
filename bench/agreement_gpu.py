"""Every kernel on the device against the CPU path, on small inputs: what the smoke level and the sanitizers run.

No pytest is needed. The tests marked `gpu` go much further; here each kernel runs in each layout, on odd and ordinary
sizes, within the bounds of `agreement.py`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from agreement import Error, asking_for, bound, levels, relative, require
from gpu_case import Ceilings, GpuCase
from record import Row, without_figures
from tissue import tissue
from torch import Tensor

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
SHAPES = [(2, 3, 7, 11), (3, 65, 1, 1), (4, 256, 28, 28), (2, 1030, 7, 7)]
SIZES = [(7, 11), (33, 65), (224, 224), (460, 700)]
PLANS = ("streaming", "resident", "cluster2", "cluster8")
NETWORK_INPUTS = (torch.float32, torch.bfloat16, torch.float16)
Check = Callable[[str], Iterator[Error]]


def er_inputs() -> Iterator[tuple[str, list[Tensor], bool]]:
    """Five random maps on the CPU in every shape, layout and dtype, per channel and per sample."""
    for shape in SHAPES:
        for name, layout in LAYOUTS.items():
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                generator = torch.Generator().manual_seed(0)
                maps = [torch.randn(shape, generator=generator).to(dtype) for _ in range(5)]
                maps = [x.contiguous(memory_format=layout) for x in maps]
                for per_sample in (False, True):
                    yield f"{shape} {name} {dtype} {per_sample}", maps, per_sample


def channel_moments(device: str) -> Iterator[Error]:
    from ernet_fast.er import operators

    for what, (x, *_), per_sample in er_inputs():
        expected = operators.channel_moments(x.double(), per_sample)
        found = operators.channel_moments(x.to(device), per_sample)
        limit = bound(x.dtype, x[:, 0].numel(), stored=False)
        size = (expected[0].square() + expected[1]).sqrt()
        yield Error(f"mean of {what}", relative(found[0], expected[0], size), limit)
        yield Error(f"variance of {what}", relative(found[1], expected[1], size.square()), limit)


def weighted_sum(device: str) -> Iterator[Error]:
    from ernet_fast.er import operators

    for what, maps, per_sample in er_inputs():
        sizes = maps[0].shape[:2] if per_sample else maps[0].shape[1:2]
        a, b = torch.randn(5, *sizes), torch.randn(*sizes)
        expected = operators.weighted_sum([x.double() for x in maps], a.double(), b.double(), True)
        found = operators.weighted_sum([x.to(device) for x in maps], a.to(device), b.to(device), True)
        yield Error(what, relative(found, expected), bound(maps[0].dtype, 5))


def weighted_dot(device: str) -> Iterator[Error]:
    from ernet_fast.er import operators

    for what, (dy, y, *maps), per_sample in er_inputs():
        y = y.relu()
        doubled = [x.double() for x in maps]
        expected = operators.weighted_dot(dy.double(), doubled, y.double(), per_sample)
        scale = operators.weighted_dot(dy.double().abs(), [x.abs() for x in doubled], None, per_sample)
        found = operators.weighted_dot(dy.to(device), [x.to(device) for x in maps], y.to(device), per_sample)
        limit = bound(dy.dtype, dy[:, 0].numel(), stored=False)
        yield Error(f"da of {what}", relative(found[0], expected[0], scale[0]), limit)
        yield Error(f"db of {what}", relative(found[1], expected[1], scale[1]), limit)
        yield Error(f"g of {what}", relative(found[2], expected[2]), 0.0)


def stage(device: str) -> Iterator[Error]:
    """A stage, fused on the device against the naive composition in float64 on the CPU: values and every gradient."""
    import ernet_fast

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
            found = {"output": y, "gradient of the input": leaf.grad, **gradients}
            results.append({name: value.detach().cpu() for name, value in found.items()})
        scale = max(float(value.norm()) for value in results[0].values())
        for name, expected in results[0].items():
            # gradients of convolutions before a BatchNorm are differences of large terms: an absolute part of the bound
            error = float((results[1][name] - expected).norm() / (expected.norm() + 1e-6 * scale))
            yield Error(name, error, 1e-7)


def images_of_every_kind(*dtypes: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every size in both layouts."""
    for height, width in SIZES:
        for channels_last in (False, True):
            images = tissue(3, height, width, channels_last)
            for dtype in dtypes:
                yield f"{height} x {width} {'NHWC' if channels_last else 'NCHW'} {dtype}", images.to(dtype)


def macenko_fits(device: str) -> Iterator[Error]:
    import ernet_fast  # noqa: F401  (registers the operators)

    for what, images in images_of_every_kind(torch.uint8, torch.float32):
        expected = torch.ops.ernet.macenko_fit(images, 240.0, 1.0, 0.15, False)
        found = torch.ops.ernet.macenko_fit(images.to(device), 240.0, 1.0, 0.15, False)
        # of float32 images the logarithm may be fused differently: one unit of fixed point a pixel
        limit = 1e-9 if images.dtype == torch.uint8 else 1e-5
        for a, b in zip(found, expected, strict=True):
            yield Error(what, float((a.cpu() - b).abs().nan_to_num(0.0).max()), limit)


def macenko_reconstruct(device: str) -> Iterator[Error]:
    from ernet_fast.stain import MacenkoNormalizer, macenko_fit

    target = MacenkoNormalizer().target
    given = [*macenko_fit(tissue(1, 64, 64))[:2], target.stain_matrix, target.max_concentration]
    for what, images in images_of_every_kind(torch.uint8, torch.float32):
        expected = torch.ops.ernet.macenko_reconstruct(images, *given, 240.0)
        found = torch.ops.ernet.macenko_reconstruct(images.to(device), *(t.to(device) for t in given), 240.0)
        if images.dtype == torch.uint8:
            yield from levels(what, found, expected)
        else:  # exponents below 16 in float32, eight roundings each
            yield Error(what, relative(found, expected), 16 * 2.0**-24 * 8)


def macenko_normalize(device: str) -> Iterator[Error]:
    """The whole call, a background tile among the images."""
    from ernet_fast.stain import MacenkoNormalizer
    from ernet_fast.stain import macenko_normalize as normalize

    target = MacenkoNormalizer().target
    for what, images in images_of_every_kind(torch.uint8):
        images[1] = 255
        expected, status = normalize(images, target, return_status=True)
        found, on_device = normalize(images.to(device), target, return_status=True)
        yield Error(f"status of {what}", float((on_device.cpu() != status).sum()), 0)
        yield from levels(what, found, expected)


def macenko_plan(device: str, plan: str) -> Iterator[Error]:
    """One plan, asked for: fits, results in the images' layout, augmented images and every kind of network input."""
    from ernet_fast.stain import MacenkoNormalizer, macenko_augment, macenko_fit
    from ernet_fast.stain import macenko_normalize as normalize

    target = MacenkoNormalizer().target
    served = 0
    for what, images in images_of_every_kind(torch.uint8):
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
        yield Error(f"stains of {what}", relative(fit.stain_matrix, expected.stain_matrix), 30 * 2.0**-24)
        yield Error(f"maxima of {what}", relative(fit.max_concentration, expected.max_concentration), 30 * 2.0**-24)
        yield from levels(what, found, normalize(images, target))
        augmented = macenko_augment(images, generator=torch.Generator().manual_seed(0))
        yield from levels(f"augmented {what}", changed, augmented)
        for dtype, scaled in inputs.items():
            wanted = (found.double() / 255).to(dtype)
            yield Error(f"{dtype} of {what}", relative(scaled, wanted), 2 * torch.finfo(dtype).eps)
    if not served and not plan.startswith("cluster"):  # which devices before compute capability 9.0 have none of
        raise AssertionError(f"plan {plan} served nothing")


LIMIT = 25.0  # seconds of a check: one that takes longer hangs
ERROR, OFF = "relative error", "values off by one level"
CHECKS: dict[str, tuple[Check, str]] = {
    "channel_moments": (channel_moments, ERROR),
    "weighted_sum": (weighted_sum, ERROR),
    "weighted_dot": (weighted_dot, ERROR),
    "stage forward and backward": (stage, ERROR),
    "macenko_fits": (macenko_fits, "absolute error"),
    "macenko_reconstruct": (macenko_reconstruct, OFF),
    "macenko_normalize": (macenko_normalize, OFF),
    **{f"macenko {plan}": (functools.partial(macenko_plan, plan=plan), OFF) for plan in PLANS},
}


def run(name: str, _: Ceilings, device: str = "cuda") -> Row:
    check, measure = CHECKS[name]
    worst = require(check(device))
    detail = f"as the CPU path; largest {measure} {worst:.2g}"
    return without_figures("agreement_gpu", name, "pass", detail, worst=worst)


def gpu_cases() -> list[GpuCase]:
    return [
        GpuCase(
            name, functools.partial(run, name), importance=0, seconds=15, limit=LIMIT, smoke=True, kernel=name,
            title=f"{name} = CPU path",
        )
        for name in CHECKS
    ]  # fmt: skip
