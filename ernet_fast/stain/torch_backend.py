"""The Macenko steps as batched torch operations: no loop over images, no host synchronisation, any device.

For GPUs, and dtypes on them, that no kernel supports.
"""

from __future__ import annotations

import functools
import math

import torch

from ernet_fast import _backend
from ernet_fast.stain.network_output import NetworkOutput, scale
from ernet_fast.stain.principal_plane import PrincipalPlane, dot, principal_plane
from ernet_fast.stain.result import (
    EQUAL_COMPONENTS,
    MIN_CONCENTRATION,
    MIN_TISSUE_PIXELS,
    OK,
    RANK_TOLERANCE,
    MacenkoStatus,
)

PIXELS_AT_A_TIME = 1 << 24
"""Images are taken in groups of about this many pixels: float64 ODs and sorted keys cost about 200 bytes a pixel."""

PAIRS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))
LOW_WORD = 0xFFFFFFFF

# csrc/macenko/steps/od.h
OD_SCALE = 2.0**24
SQRT_HALF = 0.70710678
FIXED_SHIFT = 8388608.0
FIXED_LN2 = 11629080
LOG_POLYNOMIAL = (
    1466990.625, -2412115.75, 2508042.0, -2778423.75, 3348225.25, -4194665.5, 5592548.0, -8388606.0, 16777216.0,
)  # fmt: skip


@functools.lru_cache(maxsize=1)
def cuda_kernels_available() -> bool:
    """True if the package was built with its CUDA kernels."""
    return bool(
        _backend.extension_available()
        and torch._C._dispatch_has_kernel_for_dispatch_key("ernet::macenko_separate", "CUDA")
    )


@functools.cache
def why_no_kernels(device: int) -> str | None:
    """Why the CUDA kernels do not serve the CUDA device of this number; None if they do."""
    if not _backend.extension_available():
        return _backend.why_unavailable() or "the compiled operators are missing"
    if not cuda_kernels_available():
        return "the package was built without CUDA kernels (install nvcc or set CUDA_HOME, and build with ERNET_CUDA=1)"
    architectures = (_backend.build_info() or {})["cuda_archs"]
    major, minor = torch.cuda.get_device_capability(device)
    if _backend.serves_capability(architectures, major, minor) or _backend.compiled_at_load(
        architectures, major, minor
    ):
        return None
    return (
        f"the CUDA kernels are compiled for {', '.join(architectures)}, and the device has compute capability "
        f"{major}.{minor} (build with ERNET_CUDA_ARCHS={major}{minor})"
    )


# What torch.compiler.assume_constant_result does, which would import the compiler now.
why_no_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def optical_density(images: torch.Tensor, Io: float, range: float) -> torch.Tensor:
    """OD = -ln((I + 1) / Io) in float64, [B, 3, H W]."""
    return -((grey_levels(images, range) + 1) / Io).log()


def grey_levels(images: torch.Tensor, range: float) -> torch.Tensor:
    """Float64 values on the scale 0 to 255, [B, 3, H W]."""
    levels = images.double().flatten(2)
    return levels if images.dtype == torch.uint8 else levels * (255 / range)


def _fixed_od(images: torch.Tensor, od: torch.Tensor, Io: float) -> torch.Tensor:
    """OD with 24 fractional bits as int64, in the arithmetic of csrc/macenko/steps/od.h; undefined for od < 0."""
    if images.dtype != torch.uint8:
        return (od * OD_SCALE + 0.5).long()
    return _fixed_od_of_levels(images.device, Io).take(images.flatten(2).long())


def _fixed_od_of_levels(device: torch.device, Io: float) -> torch.Tensor:
    """Fixed-point OD of the grey levels 0 to 255, made on `device`: fused float32 operations, rounded one by one."""
    mantissa, exponent = torch.frexp(torch.arange(1, 257, device=device, dtype=torch.float32))
    low = mantissa < SQRT_HALF
    f = mantissa.where(~low, mantissa * 2) - 1
    exponent = exponent - low.int()
    value = torch.full_like(f, LOG_POLYNOMIAL[0])
    for coefficient in (*LOG_POLYNOMIAL[1:], FIXED_SHIFT):
        # The product of two float32 is exact in float64.
        value = (value.double() * f.double() + coefficient).float()
    offset = int(math.log(Io) * OD_SCALE + 0.5) + int(FIXED_SHIFT)
    return offset - exponent.long() * FIXED_LN2 - value.long()


def macenko_moments(
    images: torch.Tensor, Io: float, beta: float, range: float = 255.0, inside: torch.Tensor | None = None
) -> torch.Tensor:
    """Count, sums and products of the tissue OD (`inside` [B, H W]), [B, 10] float64; count NaN for invalid levels.

    Integer sums, as in the compiled operators: the same bits for any batch.
    """
    od = optical_density(images, Io, range)
    tissue = _tissue(od, beta, inside)
    levels = grey_levels(images, range)
    valid = ((levels >= -0.5) & (levels <= 255.5)).all(dim=1)
    valid = (valid if inside is None else valid | ~inside).all(dim=1)
    count = tissue.sum(dim=1).double().where(valid, math.nan)
    fixed = _fixed_od(images, od.where(tissue[:, None], 0.0), Io) * tissue[:, None]
    sums = [fixed[:, c].sum(dim=1).double() / OD_SCALE for c in (0, 1, 2)]
    products = [_sum_of_products(fixed[:, i], fixed[:, j]) for i, j in PAIRS]
    return torch.stack([count, *sums, *products], dim=1)


def _tissue(od: torch.Tensor, beta: float, inside: torch.Tensor | None) -> torch.Tensor:
    tissue = (od >= beta).all(dim=1)
    return tissue if inside is None else tissue & inside


def _sum_of_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sums over dimension 1 of the products of two non-negative fixed-point numbers, exact in 85 bits, then rounded."""
    product = a * b
    low = (product & LOW_WORD).sum(dim=1)
    high = (product >> 32).sum(dim=1) + (low >> 32)
    return (high.double() * 2.0**32 + (low & LOW_WORD).double()) / OD_SCALE**2


def macenko_fit(
    images: torch.Tensor,
    Io: float,
    alpha: float,
    beta: float,
    nearest: bool,
    range: float = 255.0,
    inside: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stain matrices [B, 3, 2], maximal concentrations [B, 2] and status [B], of the pixels `inside` [B, H W]."""
    group = max(1, PIXELS_AT_A_TIME // max(1, images.shape[2] * images.shape[3]))
    if images.shape[0] > group:
        groups = images.split(group)
        masks = [None] * len(groups) if inside is None else inside.split(group)
        fits = [macenko_fit(x, Io, alpha, beta, nearest, range, m) for x, m in zip(groups, masks, strict=True)]
        stain, maximum, status = map(torch.cat, zip(*fits, strict=True))
        return stain, maximum, status
    moments = macenko_moments(images, Io, beta, range, inside)
    count = moments[:, 0].nan_to_num(0.0)
    status = torch.full(count.shape, MacenkoStatus.OK, dtype=torch.int32, device=images.device)
    _set_status(status, moments[:, 0].isnan(), MacenkoStatus.NON_FINITE)
    _set_status(status, count < MIN_TISSUE_PIXELS, MacenkoStatus.TOO_FEW_TISSUE_PIXELS)
    plane, deficient = _plane(moments, count, status == OK)
    _set_status(status, deficient, MacenkoStatus.RANK_DEFICIENT)

    od = optical_density(images, Io, range)
    phi = torch.atan2(_along(plane.second, od), _along(plane.first, od))
    phi = phi.where(_tissue(od, beta, inside), math.inf)
    ordered = phi.nan_to_num(math.inf, math.inf, math.inf).sort(dim=1).values
    angles = [percentile(ordered, count, q, nearest) for q in (alpha, 100 - alpha)]
    stain, sine = _stain(plane, *(angle.where(status == OK, 0.0) for angle in angles))
    _set_status(status, ~(sine > RANK_TOLERANCE), MacenkoStatus.RANK_DEFICIENT)

    everything = torch.full_like(count, od.shape[2]) if inside is None else inside.sum(dim=1).double()
    rows = concentration_rows(stain)
    maxima = []
    for stain_of_two in (0, 1):
        amount = _along(rows[:, stain_of_two], od).nan_to_num(0.0)
        if inside is not None:
            amount = amount.where(inside, math.inf)
        maxima.append(percentile(amount.sort(dim=1).values, everything, 99, nearest))
    maximum = torch.stack(maxima, dim=1)
    _set_status(status, ~(maximum > MIN_CONCENTRATION).all(dim=1), MacenkoStatus.ZERO_CONCENTRATION)
    ok = status == OK
    return stain.where(ok[:, None, None], math.nan), maximum.where(ok[:, None], math.nan), status


def _along(vector: torch.Tensor, od: torch.Tensor) -> torch.Tensor:
    """Scalar products [B, H W] of [B, 3] and [B, 3, H W]; a matrix product may round otherwise for another B."""
    x, y, z = vector[:, :, None].unbind(dim=1)
    return x * od[:, 0] + y * od[:, 1] + z * od[:, 2]


def _set_status(status: torch.Tensor, bad: torch.Tensor, value: MacenkoStatus) -> None:
    """The first reason stays."""
    status.masked_fill_(bad & (status == OK), int(value))


def _plane(moments: torch.Tensor, count: torch.Tensor, usable: torch.Tensor) -> tuple[PrincipalPlane, torch.Tensor]:
    """The plane of the two stains, and which images have none."""
    n = count.clamp(min=2)
    mean = moments[:, 1:4] / n[:, None]
    product = moments[:, 4:].unbind(dim=1)
    covariance = [(p - n * mean[:, i] * mean[:, j]) / (n - 1) for p, (i, j) in zip(product, PAIRS, strict=True)]
    # Images without a plane get a harmless matrix.
    xx, xy, xz, yy, yz, zz = (c.where(usable, h) for c, h in zip(covariance, (1.0, 0, 0, 2.0, 0, 3.0), strict=True))
    plane = principal_plane((xx, xy, xz, yy, yz, zz))
    mean_square = (product[0] + product[3] + product[5]) / n
    deficient = usable & ~(plane.middle > RANK_TOLERANCE * mean_square)
    first = torch.ones_like(n).where(plane.first[:, 0] >= 0, -1.0)[:, None]
    second = torch.ones_like(n).where(dot(mean, plane.second) >= 0, -1.0)[:, None]
    return PrincipalPlane(plane.middle, first * plane.first, second * plane.second), deficient


def percentile(ordered: torch.Tensor, count: torch.Tensor, percent: float, nearest: bool) -> torch.Tensor:
    """A percentile of the first `count` of each row of sorted values [B, n]."""
    last = (count - 1).clamp(min=0)
    if nearest:
        rank = (0.01 * percent * last).round().long()[:, None]
        return ordered.gather(1, rank)[:, 0]
    position = last * (percent / 100)
    lower = position.floor().clamp(max=ordered.shape[1] - 1)
    weight = position - lower
    upper = torch.minimum(lower + 1, last)
    a = ordered.gather(1, lower.long()[:, None])[:, 0]
    b = ordered.gather(1, upper.long()[:, None])[:, 0]
    return torch.where(weight < 0.5, a + (b - a) * weight, b - (b - a) * (1 - weight))


def _stain(
    plane: PrincipalPlane, low_angle: torch.Tensor, high_angle: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stain matrix [B, 3, 2] of the extreme angles [B], ordered by the rule of `MacenkoFit`, and its squared sine."""
    low, high = (
        plane.first * angle.cos()[:, None] + plane.second * angle.sin()[:, None] for angle in (low_angle, high_angle)
    )
    red, green, blue = (low - high).unbind(dim=1)
    without_red = torch.where(green.abs() > EQUAL_COMPONENTS, green < 0, blue > 0)
    low_first = torch.where(red.abs() > EQUAL_COMPONENTS, red > 0, without_red)[:, None]
    stain = torch.stack([low.where(low_first, high), high.where(low_first, low)], dim=2)
    return stain, gram_determinant(stain)


def gram_determinant(stain: torch.Tensor) -> torch.Tensor:
    """det(HEᵀ HE) of [B, 3, 2]."""
    h, e = stain.unbind(dim=2)
    return (h * h).sum(1) * (e * e).sum(1) - (h * e).sum(1) ** 2


def concentration_rows(stain: torch.Tensor) -> torch.Tensor:
    """The pseudo-inverse [B, 2, 3] of [B, 3, 2] in closed form."""
    h, e = stain.unbind(dim=2)
    hh, ee, he = ((a * b).sum(1, keepdim=True) for a, b in ((h, h), (e, e), (h, e)))
    scale = 1 / (hh * ee - he * he)
    return torch.stack([(ee * h - he * e) * scale, (hh * e - he * h) * scale], dim=1)


def reconstruction_matrix(
    source_stain: torch.Tensor, source_max: torch.Tensor, target_stain: torch.Tensor, target_max: torch.Tensor
) -> torch.Tensor:
    """M = HE_target diag(max_target / max_source) pinv(HE_source), [B, 3, 3]; differentiable."""
    gain = (target_max / source_max)[:, None, :]
    return (target_stain * gain) @ concentration_rows(source_stain)


def change_matrix(
    source_stain: torch.Tensor, source_max: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """M = HE diag(gain) pinv(HE) and the tint HE shift [B, 3]; differentiable."""
    matrix = (source_stain * gain[:, None, :]) @ concentration_rows(source_stain)
    return matrix, (source_stain @ shift[:, :, None])[:, :, 0]


def transform(
    images: torch.Tensor, matrix: torch.Tensor, tint: torch.Tensor | None, Io: float, range: float
) -> torch.Tensor:
    """I' = min(Io exp(-(M OD + tint)), 255) with M [1 or B, 3, 3] and tint [B, 3], truncated for uint8.

    A pixel without a finite OD comes out as NaN.
    """
    group = max(1, PIXELS_AT_A_TIME // max(1, images.shape[2] * images.shape[3]))
    count = images.shape[0]
    tints = matrix.new_zeros((1, 3)) if tint is None else tint
    matrices, tints = matrix.expand(count, 3, 3), tints.expand(count, 3)
    results = []
    for part, m, t in zip(images.split(group), matrices.split(group), tints.split(group), strict=True):
        od = optical_density(part, Io, range)
        exponents = [_along(m[:, c], od) + t[:, c, None] for c in (0, 1, 2)]
        levels = (Io * (-torch.stack(exponents, dim=1)).exp()).clamp(max=255)
        if images.dtype == torch.uint8:
            levels = levels.nan_to_num(255.0)  # as the operators do with stains that are not finite
        else:
            defined = od.isfinite().all(dim=1, keepdim=True)
            levels = (levels * (range / 255)).where(defined, math.nan)
        results.append(torch.empty_like(part).copy_(levels.reshape(part.shape)))
    return results[0] if len(results) == 1 else torch.cat(results)


def macenko_normalize(
    images: torch.Tensor,
    target_stain: torch.Tensor,
    target_max: torch.Tensor,
    Io: float,
    alpha: float,
    beta: float,
    nearest: bool,
    identity: bool,
    range: float = 255.0,
    *,
    dtype: torch.dtype | None = None,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fit and reconstruct; images without a fit take the target's stains as source, or come back as they are."""
    stain, maximum, status = macenko_fit(images, Io, alpha, beta, nearest, range)
    ok = status == OK
    source = stain.where(ok[:, None, None], target_stain), maximum.where(ok[:, None], target_max)
    out = transform(images, reconstruction_matrix(*source, target_stain, target_max), None, Io, range)
    if identity:
        out = out.where(ok[:, None, None, None], images)
    if dtype is not None:
        mean = torch.zeros(3, dtype=torch.float64, device="cpu") if mean is None else mean
        std = torch.ones(3, dtype=torch.float64, device="cpu") if std is None else std
        out = scale(out, NetworkOutput(dtype, mean, std), range).permute(0, 2, 3, 1)
    return out, stain, maximum, status
