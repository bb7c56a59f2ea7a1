"""The ER loops at every size where the work is cut differently: one below, at and one above each of their constants.

The constants are read from the sources, so a constant that is changed moves the sizes with it. Every result is compared
with float64; memory of results holds NaN before, so that an element that nobody wrote shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from er_cases import LAYOUTS, maps_like, new_table, tolerance
from other_isa import ISAS, run_on
from torch import Tensor

from ernet_fast import _backend
from ernet_fast.er import operators
from ernet_fast.er.epilogue_arguments import NO_NORM, ShortcutArguments

OPS = torch.ops.ernet
EPS = 1e-3
SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "er"
PLANAR, CHANNELS_LAST = LAYOUTS


def constants() -> dict[str, set[int]]:
    """Every `constexpr int64_t kName = number` of the loops and the partition, with each value that a name has."""
    found: dict[str, set[int]] = {}
    for source in sorted(SOURCES.rglob("*.*")):
        for name, number, shift in re.findall(
            r"constexpr (?:int64_t|size_t) (k\w+) = (?:\w+\{)?(\d+)\}?(?: << (\d+))?;", source.read_text()
        ):
            found.setdefault(name, set()).add(int(number) << int(shift or 0))
    return found


K = constants()


def only(name: str) -> int:
    """A constant with one value."""
    (value,) = K[name]
    return value


def around(*sizes: int) -> list[int]:
    """Each size, one less and one more, without what is not positive."""
    return sorted({size + step for size in sizes for step in (-1, 0, 1) if size + step > 0})


def maps_at_once() -> list[int]:
    """Numbers of maps where the loops need another group of them."""
    groups = K["kMapsAtOnce"] | K["kLaterAtOnce"] | K["kAtOnce"]
    return sorted({n for group in groups for n in (group, group + 1)} | {2, 2 * max(groups) + 1})


Case = tuple[tuple[int, int, int, int], torch.memory_format, int]


def planar_cases() -> Iterator[Case]:
    """Planes around each constant, of more channels than one item has where they are small."""
    row, elements, channels = only("kRowElements"), only("kPlanarElements"), only("kPlanarChannels")
    chunk, mask_line = only("kPlaneChunk"), 64
    for pixels in around(only("kLeastJoined"), mask_line, only("kPlaneShift")):
        yield (3, channels + 1, 1, pixels), PLANAR, 2
    for pixels in around(row // 2, elements // channels, *K["kChunk"]):  # samples share a slab; few channels an item
        yield (3, channels + 1, 1, pixels), PLANAR, 2
    joined = [only("kMostJoined") // planes for planes in (1, 2, 4, 8, 16)]  # planes that are whole cache lines
    for pixels in around(row, *joined):
        yield (2, 5, 1, pixels), PLANAR, 3
    for pixels in around(chunk, 2 * chunk, only("kRunElements"), elements // 2, elements):
        yield (1, 3, 1, pixels), PLANAR, 2
        yield (2, 2, 1, pixels), PLANAR, 5
    for width in around(channels, 2 * channels):
        yield (3, width, 7, 7), PLANAR, 2
    for width in around(only("kGrainElements") // (7 * 7)):
        yield (1, width, 7, 7), PLANAR, 2


def channels_last_cases() -> Iterator[Case]:
    """Pixels and channels around each constant."""
    for width in around(only("kPixelChannels"), *K["kChunk"], 64):
        yield (2, width, 1, 3), CHANNELS_LAST, 2
        yield (1, width, 2, 2), CHANNELS_LAST, 5
    for pixels in around(*K["kTilePixels"], *K["kMostPixels"], only("kShiftPixels")):
        yield (2, 5, 1, pixels), CHANNELS_LAST, 2
        yield (1, only("kPixelChannels") // 2 + 1, 1, pixels), CHANNELS_LAST, 5
    for pixels in around(only("kSumElements") // 64, only("kGrainElements") // 64):
        yield (1, 64, 1, pixels), CHANNELS_LAST, 2
    for pixels in around(only("kSlabElements") // 128):  # one slab more
        yield (1, 128, 1, pixels), CHANNELS_LAST, 2
    for width in around(*(tile // size for tile in K["kTileElements"] for size in K["kTilePixels"])):
        yield (1, width, 1, 65), CHANNELS_LAST, 5


def large_cases() -> Iterator[Case]:
    """Channel tiles that stay in the cache, and outputs that are written with non-temporal stores."""
    caches = _backend.caches()
    fits = caches["channel_tile"] // (2 * 64 * 64 * 4 * (3 + 2))
    for channels in around(2 * (1 << fits.bit_length() - 1)):  # tiles are powers of two; two of them, and three
        yield (2, channels, 64, 64), PLANAR, 3
    for layout in LAYOUTS:
        for pixels in around(caches["second"] // 4 // 32):  # or never, if the CPU's probe says so
            yield (1, 32, 1, pixels), layout, 2


def many_maps_cases() -> Iterator[Case]:
    for num_maps in maps_at_once():
        for layout in LAYOUTS:
            yield (2, 5, 7, 11), layout, num_maps
            yield (1, 2, 1, only("kPlaneChunk") + 1), layout, num_maps


CASES = {
    "planar": planar_cases,
    "channels_last": channels_last_cases,
    "large": large_cases,
    "many_maps": many_maps_cases,
}


def close(found: Tensor, wanted: Tensor, terms: int, scale: Tensor | None = None) -> bool:
    """Within the rounding of `terms` products of float32; `scale`: the size of the terms where they cancel."""
    size = wanted.norm() if scale is None else torch.maximum(wanted.norm(), scale.norm())
    error = (found.double() - wanted).norm()
    return bool(error <= tolerance(found.dtype, terms) * size.clamp_min(1e-30))


def spread(v: Tensor) -> Tensor:
    """[C] or [N, C] as it multiplies [N, C, H, W]."""
    return v.double()[..., None, None] if v.dim() == 2 else v.double()[None, :, None, None]


def check_maps(maps: list[Tensor], dy: Tensor, per_sample: bool) -> None:
    """channel_moments, weighted_sum and weighted_dot."""
    n, c, h, w = dy.shape
    dims, sizes = ((2, 3), (n, c)) if per_sample else ((0, 2, 3), (c,))
    terms = n * h * w
    exact = [x.double() for x in maps]
    mean, var = operators.channel_moments(maps[0], per_sample)
    square = exact[0].square().mean(dims)
    assert close(mean, exact[0].mean(dims), terms, square.sqrt())
    assert close(var, exact[0].var(dims, correction=0), terms, square)
    generator = torch.Generator().manual_seed(len(maps))
    a, b = (torch.randn(size, generator=generator) for size in ((len(maps), *sizes), sizes))
    y = operators.weighted_sum(maps, a, b, True)
    expected = sum((spread(k) * x for k, x in zip(a, exact, strict=True)), spread(b).expand_as(dy))
    assert close(y, expected.relu(), len(maps) + 1)
    for mask in (y, None):
        da, db, g = operators.weighted_dot(dy, maps, mask, per_sample)
        g64 = dy.double() if mask is None else dy.double() * (y > 0)
        assert mask is None or torch.equal(g.double(), g64)
        for row, x in zip(da, exact, strict=True):
            assert close(row, (g64 * x).sum(dims), terms, (g64 * x).abs().sum(dims))
        assert close(db, g64.sum(dims), terms, g64.abs().sum(dims))


def preactivation(maps: list[Tensor], weight: Tensor, num_groups: int = 0) -> Tensor:
    """z_l + sum_i w_i N(z_i), in double and differentiable."""
    y = maps[-1]
    for w, z in zip(weight, maps[:-1], strict=True):
        if num_groups:
            normalised = torch.nn.functional.group_norm(z, num_groups, eps=EPS)
        else:
            mean, var = z.mean((0, 2, 3), keepdim=True), z.var((0, 2, 3), keepdim=True, correction=0)
            normalised = (z - mean) / (var + EPS).sqrt()
        y = y + w[None, :, None, None] * normalised
    return y


def scale_of(gradients: Tensor, dys: list[Tensor]) -> Tensor:
    """A gradient that passed a normalisation is a difference of terms as large as those of dy."""
    return torch.maximum(gradients.norm(), torch.stack([dy.double().norm() for dy in dys]).sum())


def er_block(
    maps: list[Tensor], table: Tensor, weight: Tensor, filed: int, num_groups: int = 0
) -> tuple[Tensor, Tensor]:
    shortcut = ShortcutArguments(weight, None, None, None, False, 0.1)
    y, a, _ = OPS.er_block(maps, table, filed, True, False, *NO_NORM, *shortcut, EPS, num_groups, True)
    return y, a


def check_shortcut_sum(maps: list[Tensor], dy: Tensor) -> None:
    """er_block of a sum of given maps, and shortcut_sum_backward."""
    generator = torch.Generator().manual_seed(1)
    terms = dy.numel() // dy.shape[1] * len(maps)
    weight = torch.randn(len(maps) - 1, dy.shape[1], generator=generator)
    table = new_table(dy, len(maps))
    y, a = er_block(maps, table, weight, 0)
    leaves = [t.double().requires_grad_() for t in (*maps, weight)]
    before = preactivation(leaves[:-1], leaves[-1])
    assert close(y, before.detach().relu(), terms)
    g64 = dy.double() * (y > 0)
    expected = torch.autograd.grad(before, leaves, g64)
    needed = [True] * (len(maps) - 1)
    dmaps, dweight, g = OPS.shortcut_sum_backward(dy, maps[:-1], y, weight, table, a, None, None, EPS, needed)
    assert torch.equal(g.double(), g64)
    for found, wanted in zip(dmaps, expected, strict=False):
        assert close(found, wanted, terms, scale_of(wanted, [dy]))
    assert close(dweight, expected[-1], terms, (terms**0.5 * torch.ones(dweight.shape)).double())


def check_stage(maps: list[Tensor], dys: list[Tensor], num_groups: int) -> None:
    """A stage of blocks on plain maps: er_block forward and er_block_backward from the last map to the first."""
    channels = maps[0].shape[1]
    terms = maps[0].numel() // channels * len(maps)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(i, channels, generator=generator) / len(maps) for i in range(len(maps))]
    table = new_table(maps[0], len(maps), num_groups)
    outputs = [er_block(maps[: i + 1], table, weights[i], i - 1, num_groups) for i in range(1, len(maps))]
    leaves = [x.double().requires_grad_() for x in maps]
    weight64 = [w.double().requires_grad_() for w in weights[1:]]
    before = [preactivation(leaves[: i + 2], w, num_groups) for i, w in enumerate(weight64)]
    gates = [dy.double() * (y > 0) for dy, (y, _) in zip(dys, outputs, strict=True)]
    expected = torch.autograd.grad(before, [*leaves, *weight64], gates)
    dweights = [torch.full_like(w, float("nan")) for w in weights]
    none = torch.empty(0)
    later: list[tuple[Tensor, ...]] = []  # the newest first, as `known` has its rows
    channels_last = not maps[0].is_contiguous()
    known = None
    for i in reversed(range(len(maps))):
        (y, a), dy = outputs[i - 1] if i else (None, None), dys[i - 1] if i else None
        columns = [list(column) for column in zip(*later, strict=True)] if later else [[] for _ in range(8)]
        measured = i + 1 < len(maps)
        earlier = maps[i - 1] if i and channels_last else None
        dz, bits, db, _, _, known = OPS.er_block_backward(
            i, maps[i], dy, y, a, *columns, None, earlier, known, table, 0, EPS, num_groups, True, measured, True
        )
        known = known if earlier is not None else None
        assert close(dz, expected[i], terms, scale_of(expected[i], dys))
        later.insert(0, (dy, bits, a, db, weights[i], none, none, dweights[i]))
    for found, wanted in zip(dweights[1:], expected[len(maps) :], strict=True):
        assert close(found, wanted, terms, (terms**0.5 * torch.ones(found.shape)).double())


def check(case: Case) -> None:
    """Every operator on maps of one shape."""
    shape, layout, num_maps = case
    dys = maps_like(shape, num_maps, torch.float32, layout, seed=1)
    maps = maps_like(shape, num_maps, torch.float32, layout)
    for per_sample in (False, True):
        check_maps(maps, dys[0], per_sample)
    check_shortcut_sum(maps, dys[0])
    for num_groups in (0, 1 if shape[3] % 2 else shape[1]):  # batch norm, and layer or instance norm
        check_stage(maps, dys[1:], num_groups)


@pytest.mark.parametrize("group", CASES)
def test_every_boundary(group):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # others do not change a bit, which other tests say
    try:
        for case in CASES[group]():
            try:
                check(case)
            except AssertionError as error:
                raise AssertionError(f"shape, layout, maps: {case}") from error
    finally:
        torch.set_num_threads(threads)


EVERY_CASE = """
tests.torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialised memory holds NaN
_backend.extension().poison_map_buffers(True)
for group in tests.CASES:
    tests.test_every_boundary(group)
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_every_other_instruction_set(isa):
    info = _backend.build_info()
    if info is not None and info["isa"].startswith(isa):
        pytest.skip("test_every_boundary has run on this one")
    run_on(isa, __file__, EVERY_CASE)
