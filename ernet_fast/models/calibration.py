"""Shortcuts set from the statistics of maps, so that a converted network starts close to the plain ResNet.

Within a stage of a plain ResNet, y_l = ReLU(x_l + y_{l-1}) with y_0 = x_0: but for the inner ReLUs, y_{l-1} is the sum
of x_0 ... x_{l-1}. So for every channel the affine function of these maps is fitted that comes closest to what the
plain network adds to x_l, block after block, on the maps of the converted network itself:

    sum over pixels of (p_l - x_l - sum_i a_i x_i - b)^2 -> min,   p_l: the plain network's sum before its last ReLU

over the pixels where that ReLU lets p_l or x_l + sum_i x_i pass; elsewhere the outputs agree. A channel in which a = 1,
b = 0 leaves less error behind the ReLU keeps these.

In the shortcut's terms w_{l,i} = a_i * std(x_i), the running statistics are the maps' own, and the means that N takes
away go, with b, to the bias of the block's last BatchNorm.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ernet_fast.models.blocks import ERBlock
from ernet_fast.models.plain_resnet import plain_branch, plain_shortcut, plain_stem
from ernet_fast.models.resnet import STAGE_NAMES, ERResNet

_RIDGE = 1e-4
"""Pull of a_i towards 1, its value without inner ReLUs, in units of the maps' mean variance: for channels that are dead
or follow one another."""
_VALUES = 1 << 23  # float64 values of the channels that are fitted at a time, 64 MiB


def check_can_calibrate(plain: nn.Module, norm: str) -> None:
    """Raise ValueError unless the shortcuts of a conversion of `plain` have constants, and biases to take the means."""
    if norm != "batch":
        raise ValueError(f"calibrate needs norm='batch', whose statistics are constants in evaluation; got {norm!r}")
    for stage in STAGE_NAMES:
        for child, block in list(plain.get_submodule(stage).named_children())[1:]:
            if not isinstance(getattr(block, "se", None), nn.Identity | None):
                raise ValueError(
                    f"calibrate: {stage}.{child}.se scales whatever the bias of the last BatchNorm adds, so the means "
                    "of earlier maps have no place. Convert a network with attention without calibrate"
                )


@torch.no_grad()
def calibrate_shortcuts(er: ERResNet, plain: nn.Module, batches: Iterable[Any]) -> None:
    """Set weights and statistics of the shortcuts of `er`, and the biases of its ER blocks' last BatchNorms.

    Args:
        er: a conversion of `plain` with norm="batch".
        plain: the plain ResNet; not modified. It is run as in evaluation, and in float32 at least.
        batches: images [N, C, H, W], or tuples that begin with them. The maps of a stage are held for all images.

    Raises:
        ValueError: no images, or batches of something else.
    """
    reference = copy.deepcopy(plain).eval()
    weight = next(reference.parameters())
    dtype = torch.promote_types(weight.dtype, torch.float32)
    reference.to(dtype)
    stems = [plain_stem(reference, images_of(batch).to(weight.device, dtype)) for batch in batches]
    if not sum(map(len, stems)):
        raise ValueError("calibrate holds no images: expected batches of images [N, C, H, W]")
    streams = [(x, x) for x in stems]  # the map of the plain network, and that of the converted one
    for name in STAGE_NAMES:
        streams = _calibrate_stage(getattr(er, name), reference.get_submodule(name), streams)


def images_of(batch: Any) -> Tensor:
    """The images of a loader's batch: itself, or the first entry of a tuple or list."""
    images = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
    if not isinstance(images, Tensor) or images.dim() != 4:
        found = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"a batch must be images [N, C, H, W], or a tuple that begins with them, got {found}")
    return images


def _calibrate_stage(
    stage: nn.Module, plain: nn.Module, streams: list[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """Calibrate the blocks of a stage; from its input to its output."""
    opening, *blocks = plain.children()
    targets, ys = ([_residual_block(opening, x) for x in xs] for xs in zip(*streams, strict=True))
    maps = [[y] for y in ys]  # a list for each batch
    means, variances = (v.unsqueeze(0) for v in _moments(ys))
    shifts = torch.zeros_like(means)
    for er_block, block in zip(list(stage.children())[1:], blocks, strict=True):
        assert isinstance(er_block, ERBlock)
        sums = [plain_branch(block, y) + y for y in targets]
        outputs = [plain_branch(block, y) for y in ys]
        a, b = fit_sum(maps, outputs, sums)
        shift = b + (a * means).sum(0)
        _set_shortcut(er_block, a, means + shifts, variances, shift)
        targets = [p.relu_() for p in sums]
        ys = [_affine(x, xs, a, b).relu_() for x, xs in zip(outputs, maps, strict=True)]
        for xs, x in zip(maps, outputs, strict=True):
            xs.append(x)
        mean, variance = _moments(outputs)
        means, variances = torch.cat([means, mean[None]]), torch.cat([variances, variance[None]])
        shifts = torch.cat([shifts, shift[None]])
    return list(zip(targets, ys, strict=True))


def _residual_block(block: nn.Module, x: Tensor) -> Tensor:
    return torch.relu(plain_branch(block, x) + plain_shortcut(block, x))


def fit_sum(maps: list[list[Tensor]], outputs: list[Tensor], sums: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Coefficients a [l, C] and b [C], float64, with which ReLU(output + sum_i a_i x_i + b) is close to ReLU(sum).

    Args:
        maps: for each batch, x_0 ... x_{l-1} [N, C, H, W].
        outputs: for each batch, x_l.
        sums: for each batch, what the plain network has in the place of x_l + sum_i a_i x_i + b.
    """
    fits, channels = [], sums[0].shape[1]
    pixels = sum(p.numel() for p in sums) // channels
    step = max(1, _VALUES // max(1, pixels * (len(maps[0]) + 2)))
    for start in range(0, channels, step):
        tile = slice(start, start + step)
        batches = zip(maps, outputs, sums, strict=True)
        rows = [_rows([*(x[:, tile] for x in xs), x_l[:, tile], p[:, tile]]) for xs, x_l, p in batches]
        fits.append(_fit_channels(rows))
    return torch.cat([a for a, _ in fits], 1), torch.cat([b for _, b in fits])


def _rows(maps: list[Tensor]) -> Tensor:
    """[C, maps, pixels] in float64 of maps [N, C, H, W]."""
    return torch.stack([x.double() for x in maps]).permute(2, 0, 1, 3, 4).flatten(2)


def _fit_channels(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`fit_sum` of some channels, rows x_0 ... x_{l-1}, x_l, p_l, by the normal equations of d = a - 1."""
    gram: Any = 0.0  # of the maps, what their sum leaves, and 1
    for rows in batches:
        near = rows[:, :-1].sum(1, keepdim=True)
        passes = ((rows[:, -1:] > 0) | (near > 0)).double()
        columns = torch.cat([rows[:, :-2], rows[:, -1:] - near, torch.ones_like(near)], 1) * passes
        gram = gram + columns @ columns.mT
    count = gram[:, -1, -1].clamp(min=1.0)  # a dead channel has no pixel
    means = gram[:, :-1, -1] / count[:, None]
    covariances = gram[:, :-1, :-1] / count[:, None, None] - means[:, :, None] * means[:, None, :]
    own, cross = covariances[:, :-1, :-1], covariances[:, :-1, -1]
    pull = _RIDGE * own.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(own.dtype).tiny
    pulled = own + pull[:, None, None] * torch.eye(own.shape[1], dtype=own.dtype, device=own.device)
    d = torch.linalg.solve(pulled, cross)
    b = means[:, -1] - (d * means[:, :-1]).sum(1)
    better = _error(batches, d, b) < _error(batches, torch.zeros_like(d), torch.zeros_like(b))
    return torch.where(better, 1.0 + d.T, 1.0), torch.where(better, b, 0.0)


def _error(batches: list[Tensor], d: Tensor, b: Tensor) -> Tensor:
    """[C]: squared differences behind the ReLU, summed over pixels."""
    error: Any = 0.0
    for rows in batches:
        y = rows[:, :-1].sum(1) + (d[:, :, None] * rows[:, :-2]).sum(1) + b[:, None]
        error = error + (y.relu() - rows[:, -1].relu()).square().sum(1)
    return torch.as_tensor(error)


def _moments(maps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance [C], float64, of the values of all maps [N, C, H, W]."""
    count = sum(x.numel() // x.shape[1] for x in maps)
    mean: Any = sum(x.double().sum((0, 2, 3)) for x in maps) / count
    squares: Any = sum((x.double() - mean.view(-1, 1, 1)).square().sum((0, 2, 3)) for x in maps)
    return mean, squares / max(count - 1, 1)


def _affine(x: Tensor, maps: list[Tensor], a: Tensor, b: Tensor) -> Tensor:
    """X + sum_i a_i x_i + b."""
    y = x + b.to(x.dtype).view(-1, 1, 1)
    for row, earlier in zip(a.to(x.dtype), maps, strict=True):
        y.addcmul_(row.view(-1, 1, 1), earlier)
    return y


def _set_shortcut(block: ERBlock, a: Tensor, mean: Tensor, var: Tensor, shift: Tensor) -> None:
    """Make `block` add sum_i a_i (x_i - mean_i) + shift."""
    shortcut = block.shortcut
    shortcut.weight.copy_(a * (var + shortcut.eps).sqrt())
    shortcut.running_mean.copy_(mean)
    shortcut.running_var.copy_(var)
    block.last_bn.bias.add_(shift.to(block.last_bn.bias.dtype))
