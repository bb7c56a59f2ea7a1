"""The algebra on per-channel vectors of a block with group norm, in plain PyTorch: for the composed path.

What is one number a channel with batch norm is one a sample and channel here: moments, inner products, coefficients. So
a map's table has rows 0 to 3 as with batch norm, scale, 1 / deviation, centre and shift, and for each sample mean and
variance of z, and mean of x and 1 / deviation of x over the channel's group. On the CPU `ernet::er_block` does the same
(csrc/er/simd/group_coefficients.cpp). Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ernet_fast.er.epilogue_arguments import AFFINE_ROWS, BranchNorm, EpilogueState, LaterBlock, NormArguments
from ernet_fast.er.unfused_coefficients import combine_groups, combine_samples, momentum_of, update_running


def rows_of(state: EpilogueState, maps: int | slice) -> tuple[Tensor, Tensor]:
    """Views of the rows of one map, or of several along the first dimension.

    [..., 4, C]: scale, 1 / deviation, centre, shift; and [..., N, 4, C]: mean and variance of z, mean and 1 / deviation
    of x over the group.
    """
    affine, samples = state.table[maps].tensor_split([AFFINE_ROWS], dim=-2)
    return affine, samples.unflatten(-2, (-1, 4))


def file_map(state: EpilogueState, index: int, moments: tuple[Tensor, Tensor] | None, norm: NormArguments) -> None:
    """Write the rows of map `index` from the moments [N, C] of its samples; updates running statistics of `norm`."""
    affine, samples = rows_of(state, index)
    if moments is not None:
        moments = moments[0].double(), moments[1].double()
    if norm.norm == BranchNorm.NONE:
        affine.zero_()[0] = 1
    else:
        if norm.norm == BranchNorm.BATCH:
            assert moments is not None
            mean, var = combine_samples(*moments)
            if norm.mean is not None and norm.var is not None:
                momentum = momentum_of(norm.momentum, norm.batches)
                update_running(norm.mean, norm.var, mean, var, state.elements, momentum)
        else:
            assert norm.mean is not None and norm.var is not None
            mean, var = norm.mean.double(), norm.var.double()
        rstd = torch.rsqrt(var + norm.eps)
        scale = rstd if norm.gamma is None else norm.gamma.detach().double() * rstd
        shift = -scale * mean if norm.beta is None else norm.beta.detach().double() - scale * mean
        torch.stack([scale, rstd, mean, shift], out=affine)
    if moments is not None:
        scale, shift = affine[0], affine[3]
        groups = combine_groups(scale * moments[0] + shift, scale.square() * moments[1], state.num_groups)
        torch.stack([*moments, groups[0], torch.rsqrt(groups[1] + state.eps)], 1, out=samples)


def block_coefficients(state: EpilogueState, index: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients a [index + 1, N, C] and b [N, C] of the weighted sum of block `index`."""
    dtype = state.vector_dtype
    scale, _, centre, shift = rows_of(state, index)[0]
    own = scale.to(dtype)
    # the constants go with the coefficients as they are stored: rounding one must not shift a large mean
    constant = shift + (scale - own) * centre
    affine, samples = rows_of(state, slice(index))
    mean, _, group_mean, norm = samples.unbind(-2)
    s = weight.detach().double().unsqueeze(1) * norm
    exact = s * affine[:, :1]
    a = exact.to(dtype)
    b = (s * (affine[:, 3:] - group_mean) + (exact - a) * mean).sum(0) + constant
    return torch.cat([a, own.expand(1, *b.shape)]), b.to(dtype)


def map_rows(
    state: EpilogueState,
    index: int,
    norm: BranchNorm,
    later: Sequence[LaterBlock],
    sums: Tensor | None,
    *,
    reached: bool,
    passed: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Coefficients of dz [terms, N, C], its constant [N, C], and gradients of gamma and beta [C]; writes dweights.

    Args:
        state: of the stage.
        index: which map.
        norm: how it became x.
        later: the later blocks whose outputs have a gradient.
        sums: float64 [later, N, C], and where the map's own block is `reached` two more, see `operators.map_dots`; None
            if nothing needs them.
        reached: the output of the map's own block has a gradient.
        passed: a gradient from elsewhere joins dz.
    """
    dtype, measured = state.vector_dtype, state.measured[index]
    rows = [state.a[index][index]] if reached else []
    rows += [block.a[index] for block in later]
    k0 = None
    dgamma = dbeta = state.none
    if sums is not None:
        dscale, dshift, dmean, dvar = _gradients(state, index, later, sums)
        if reached:
            dscale, dshift = dscale + sums[-2].sum(0), dshift + sums[-1].sum(0)
        (scale, rstd, centre, _), samples = rows_of(state, index)
        dscale = dscale - centre * dshift
        if norm != BranchNorm.NONE:
            dgamma, dbeta = (dscale * rstd).to(dtype), dshift.to(dtype)
        if measured:
            mean = samples[:, 0]
            pixels = state.elements / mean.shape[0]
            own, constant = dvar * (2 / pixels), dmean / pixels
            batch = torch.zeros_like(centre)
            if norm == BranchNorm.BATCH:
                batch = -dscale * scale * rstd.square() / state.elements
                constant = constant - scale * dshift / state.elements
            rows.append((own + batch).to(dtype))
            # the rounded k1 multiplies z, so it must multiply the mean too
            k0 = (constant - own * mean - batch * centre + (own + batch - rows[-1]) * mean).to(dtype)
    if passed:
        rows.append(torch.ones_like(rows[0]))
    return torch.stack(rows) if rows else state.none, k0, dgamma, dbeta


def _gradients(
    state: EpilogueState, index: int, later: Sequence[LaterBlock], sums: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of scale and shift [C], and of the moments of each sample [N, C], through the shortcuts of later blocks."""
    affine, samples = rows_of(state, index)
    scale, shift = affine[0], affine[3]
    mean, var, group_mean, norm = samples.unbind(1)
    if not later:
        return torch.zeros_like(scale), torch.zeros_like(scale), torch.zeros_like(mean), torch.zeros_like(mean)
    da, db = sums[: len(later)], torch.stack([block.db for block in later])
    weight = torch.stack([block.weight[index].detach() for block in later]).double().unsqueeze(1)
    centred = scale * da + (shift - group_mean) * db
    for block, dweight in zip(later, (norm * centred).sum(1), strict=True):
        block.dweight[index] = dweight
    s = weight * norm
    dscale, dshift = (s * da).sum((0, 1)), (s * db).sum((0, 1))

    def group_mean_of(t: Tensor) -> Tensor:
        groups = t.unflatten(1, (state.num_groups, -1))
        return groups.mean(2, keepdim=True).expand_as(groups).flatten(1)

    dgroup_var = -0.5 * norm**3 * group_mean_of((weight * centred).sum(0))
    dx = group_mean_of(-(s * db).sum(0)) + 2 * dgroup_var * (scale * mean + shift - group_mean)
    dscale = dscale + (2 * dgroup_var * scale * var + dx * mean).sum(0)
    return dscale, dshift + dx.sum(0), dx * scale, dgroup_var * scale.square()
