"""How the Triton kernels cut maps: everything is covered once, whatever the shape, and nothing exceeds its type."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernet_fast.er.triton.tiling import Shape, ceil_div, merge_tile, padded_count, power_of_two, reduction, sum_tile

shapes = st.builds(
    Shape,
    N=st.integers(1, 512),
    C=st.integers(1, 4096),
    P=st.integers(1, 1 << 22),
    channels_last=st.booleans(),
    per_sample=st.booleans(),
)
itemsizes = st.sampled_from([2, 4, 8])


@settings(max_examples=300, deadline=None)
@given(shape=shapes, itemsize=itemsizes)
def test_tiles(shape, itemsize):
    tile, count = sum_tile(shape, itemsize)
    for size in (tile.rows, tile.cols):
        assert size >= 1 and size == power_of_two(size)
    assert tile.rows * tile.cols * itemsize == 8192
    length = shape.C if shape.channels_last else shape.P
    assert length % tile.align == 0 and tile.align * itemsize <= 16
    assert tile.wide or (tile.rows - 1) * length + tile.cols < 2**31
    rows = shape.N * shape.C * shape.P // length
    covered = count * tile.rows * tile.cols
    assert covered >= rows * length
    groups = shape.groups if shape.channels_last else 1
    assert count == groups * ceil_div(rows // groups, tile.rows) * ceil_div(length, tile.cols)


@settings(max_examples=300, deadline=None)
@given(shape=shapes, itemsize=itemsizes)
def test_reductions(shape, itemsize):
    cut = reduction(shape, itemsize)
    pixels = shape.N * shape.P // shape.groups
    assert cut.runs * cut.run_length == pixels
    assert cut.step == (cut.tile.rows if shape.channels_last else cut.tile.cols)
    units = cut.runs * ceil_div(cut.run_length, cut.step)
    assert (cut.slabs - 1) * cut.units_per_slab < units <= cut.slabs * cut.units_per_slab  # no slab is empty
    assert cut.programs % (cut.slabs * shape.groups) == 0
    assert min(cut.tile.rows, cut.tile.cols) >= 1 and cut.programs // shape.groups <= max(2048, shape.C)
    # A sample is cut as if it were alone, so that its results do not depend on the batch.
    if shape.per_sample:
        alone = reduction(shape._replace(N=1), itemsize)
        assert (alone.slabs, alone.units_per_slab, alone.tile) == (cut.slabs, cut.units_per_slab, cut.tile)


@pytest.mark.parametrize(("pixels", "cols"), [(3136, 64), (1 << 16, 512), (784, 64), (196, 256), (49, 64), (1, 1)])
def test_planar_tiles_pad_little(pixels, cols):
    tile, _ = sum_tile(Shape(8, 256, pixels, False, False), 2)
    assert ceil_div(pixels, tile.cols) * tile.cols <= 1.31 * pixels and tile.cols == cols


def test_long_rows_take_64_bit_offsets():
    assert sum_tile(Shape(1, 3, 1 << 31, False, False), 2)[0].wide
    assert not sum_tile(Shape(64, 256, 1 << 20, False, False), 2)[0].wide
    assert not sum_tile(Shape(1 << 12, 2048, 1 << 12, True, False), 2)[0].wide


def test_padding_and_merging():
    assert [padded_count(n) for n in (1, 2, 3, 4, 5, 8, 9, 40)] == [2, 2, 4, 4, 8, 8, 16, 64]
    assert merge_tile(1) == (1, 1024) and merge_tile(2) == merge_tile(4096) == (128, 8)
