"""The Macenko steps as batched torch operations: no loop over images, no host synchronisation, any device.

Serves GPUs where no kernel does. On CUDA the moments and the reconstruction are kernels where the package was built
with them.
"""

from __future__ import annotations

import functools
import math

import torch

from ernet_fast import _backend
from ernet_fast.stain.result import MIN_CONCENTRATION, MIN_TISSUE_PIXELS, RANK_TOLERANCE, MacenkoStatus

PIXELS_AT_A_TIME = 1 << 24
"""Images are taken in groups of about this many pixels: sorting float64 keys costs about 100 bytes a pixel."""


@functools.lru_cache(maxsize=1)
def cuda_kernels_available() -> bool:
    """True if the package was built with its CUDA kernels."""
    return bool(
        _backend.extension_available()
        and torch._C._dispatch_has_kernel_for_dispatch_key("ernet::macenko_moments", "CUDA")
    )


def _kernels_serve(images: torch.Tensor) -> bool:
    """True if the CUDA kernels take these images; they hold values in at most float32."""
    return images.is_cuda and images.dtype in (torch.uint8, torch.float32) and cuda_kernels_available()


def optical_density(images: torch.Tensor, Io: float, range: float) -> torch.Tensor:
    """OD = -ln((I + 1) / Io) in float64, [B, 3, H W]."""
    return -((grey_levels(images, range) + 1) / Io).log()


def grey_levels(images: torch.Tensor, range: float) -> torch.Tensor:
    """Float64 values on the scale 0 to 255, [B, 3, H W]."""
    levels = images.double().flatten(2)
    return levels if images.dtype == torch.uint8 else levels * (255 / range)


def macenko_moments(images: torch.Tensor, Io: float, beta: float, range: float = 255.0) -> torch.Tensor:
    """Count, sums and products of the tissue OD, [B, 10] float64; the count is NaN where a value is no grey level."""
    od = optical_density(images, Io, range)
    tissue = (od >= beta).all(dim=1)
    od = od.where(tissue[:, None], 0.0)
    levels = grey_levels(images, range)
    valid = ((levels >= -0.5) & (levels <= 255.5)).flatten(1).all(dim=1)
    count = tissue.sum(dim=1, dtype=torch.float64).where(valid, math.nan)
    products = od @ od.mT
    upper = products[:, [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]]
    return torch.cat([count[:, None], od.sum(dim=2), upper], dim=1)


def macenko_fit(
    images: torch.Tensor, Io: float, alpha: float, beta: float, nearest: bool, range: float = 255.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stain matrices [B, 3, 2], maximal concentrations [B, 2] and status [B]."""
    pixels = images.shape[2] * images.shape[3]
    group = max(1, PIXELS_AT_A_TIME // max(1, pixels))
    if images.shape[0] <= group:
        return _fit_group(images, Io, alpha, beta, nearest, range)
    parts = [_fit_group(part, Io, alpha, beta, nearest, range) for part in images.split(group)]
    stain, maximum, status = zip(*parts, strict=True)
    return torch.cat(stain), torch.cat(maximum), torch.cat(status)


def _fit_group(
    images: torch.Tensor, Io: float, alpha: float, beta: float, nearest: bool, range: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    use_kernel = _kernels_serve(images)
    measure = torch.ops.ernet.macenko_moments if use_kernel else macenko_moments
    moments = measure(images, Io, beta, range)
    count = moments[:, 0].nan_to_num(0.0)
    status = torch.full(count.shape, MacenkoStatus.OK, dtype=torch.int32, device=images.device)
    _set_status(status, moments[:, 0].isnan(), MacenkoStatus.NON_FINITE)
    _set_status(status, count < MIN_TISSUE_PIXELS, MacenkoStatus.TOO_FEW_TISSUE_PIXELS)
    plane, deficient = _plane(moments, count, status == MacenkoStatus.OK)
    _set_status(status, deficient, MacenkoStatus.RANK_DEFICIENT)

    od = optical_density(images, Io, range)
    tissue = (od >= beta).all(dim=1)
    projected = plane.mT @ od
    phi = torch.atan2(projected[:, 1], projected[:, 0]).masked_fill(~tissue, math.inf)
    ordered = phi.nan_to_num(math.inf, math.inf, math.inf).sort(dim=1).values
    angles = torch.stack([percentile(ordered, count, q, nearest) for q in (alpha, 100 - alpha)], dim=1)
    angles = angles.where((status == MacenkoStatus.OK)[:, None], 0.0)
    stain, sine = _stain(plane, angles)
    _set_status(status, ~(sine > RANK_TOLERANCE), MacenkoStatus.RANK_DEFICIENT)

    concentration = concentration_rows(stain) @ od
    ordered = concentration.nan_to_num(0.0).flatten(0, 1).sort(dim=1).values
    everything = count.new_full((len(ordered),), float(od.shape[2]))
    maximum = percentile(ordered, everything, 99, nearest).reshape(-1, 2)
    _set_status(status, ~(maximum > MIN_CONCENTRATION).all(dim=1), MacenkoStatus.ZERO_CONCENTRATION)
    ok = status == MacenkoStatus.OK
    return stain.where(ok[:, None, None], math.nan), maximum.where(ok[:, None], math.nan), status


def _set_status(status: torch.Tensor, bad: torch.Tensor, value: MacenkoStatus) -> None:
    """The first reason stays."""
    status.masked_fill_(bad & (status == MacenkoStatus.OK), int(value))


def _plane(moments: torch.Tensor, count: torch.Tensor, usable: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions [B, 3, 2] of the middle and the largest eigenvalue, and which images have none."""
    n = count.clamp(min=2)[:, None]
    mean = moments[:, 1:4] / n
    index = torch.tensor([[0, 1, 2], [1, 3, 4], [2, 4, 5]], device=moments.device)
    product = moments[:, 4:][:, index]
    covariance = (product - n[:, :, None] * mean[:, :, None] * mean[:, None, :]) / (n[:, :, None] - 1)
    # eigh refuses NaN; images without a plane get a harmless matrix.
    harmless = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device=moments.device))
    covariance = covariance.where(usable[:, None, None], harmless)
    values, vectors = torch.linalg.eigh(covariance)
    mean_square = product.diagonal(dim1=1, dim2=2).sum(dim=1) / n[:, 0]
    deficient = usable & ~(values[:, 1] > RANK_TOLERANCE * mean_square)
    plane = vectors[:, :, 1:]
    first = torch.where(plane[:, 0, 0] < 0, -1.0, 1.0)
    second = torch.where((mean * plane[:, :, 1]).sum(dim=1) < 0, -1.0, 1.0)
    return plane * torch.stack([first, second], dim=1)[:, None, :], deficient


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


def _stain(plane: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stain matrix [B, 3, 2] of the extreme angles [B, 2], and the squared sine of the angle between its columns."""
    directions = plane @ torch.stack([angles.cos(), angles.sin()], dim=1)
    low_first = (directions[:, 0, 0] > directions[:, 0, 1])[:, None, None]
    stain = torch.where(low_first, directions, directions.flip(2))
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


def macenko_reconstruct(
    images: torch.Tensor,
    source_stain: torch.Tensor,
    source_max: torch.Tensor,
    target_stain: torch.Tensor,
    target_max: torch.Tensor,
    Io: float,
    range: float = 255.0,
) -> torch.Tensor:
    """I' = min(Io exp(-M OD), 255), truncated for uint8; a pixel without a finite OD comes out as NaN."""
    matrix = reconstruction_matrix(source_stain, source_max, target_stain, target_max)
    out = torch.empty_like(images)
    group = max(1, PIXELS_AT_A_TIME // max(1, images.shape[2] * images.shape[3]))
    matrices = matrix.expand(images.shape[0], 3, 3)
    for part, m, result in zip(images.split(group), matrices.split(group), out.split(group), strict=True):
        od = optical_density(part, Io, range)
        levels = (Io * (-(m @ od)).exp()).clamp(max=255)
        if images.dtype != torch.uint8:
            defined = od.isfinite().all(dim=1, keepdim=True)
            levels = (levels * (range / 255)).where(defined, math.nan)
        result.copy_(levels.reshape(part.shape))
    return out


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fit and reconstruct; images without a fit take the target's stains as source, or come back as they are."""
    stain, maximum, status = macenko_fit(images, Io, alpha, beta, nearest, range)
    ok = status == MacenkoStatus.OK
    source_stain = stain.where(ok[:, None, None], target_stain)
    source_max = maximum.where(ok[:, None], target_max)
    use_kernel = _kernels_serve(images)
    rebuild = torch.ops.ernet.macenko_reconstruct if use_kernel else macenko_reconstruct
    out = rebuild(images, source_stain.contiguous(), source_max.contiguous(), target_stain, target_max, Io, range)
    if identity:
        out = out.where(ok[:, None, None, None], images)
    return out, stain, maximum, status
