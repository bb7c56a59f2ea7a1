"""The epilogue of a block: the same bits as one operator and step by step, tile by tile, in any number of threads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from er_cases import DTYPES, LAYOUTS, maps_like, new_table, tolerance
from other_isa import ISAS, run_on
from stage_cases import STEPS, Tails, tails
from torch import Tensor, nn

from ernet_fast import ERShortcut
from ernet_fast.er.epilogue_arguments import NO_NORM, BranchNorm, LaterBlock, ShortcutArguments
from ernet_fast.er.stage import StageMaps

# the last two are so large that contiguous maps are cut into strips, the last of them narrower
SHAPES = [
    (2, 6, 7, 11),
    (2, 37, 14, 14),
    (2, 5, 24, 43),
    (3, 17, 1, 1),
    (2, 1030, 3, 3),
    (4, 600, 8, 8),
    (2, 37, 61, 67),
]
NUM_MAPS = 8  # more than are taken at once


def both(shape: tuple[int, ...], dtype: torch.dtype, *, relu: bool = True) -> tuple[Tails, Tails]:
    """A stage's tails, with blocks of one operator each way and step by step."""
    whole = Tails(NUM_MAPS, channels=shape[1])
    for shortcut in whole.shortcuts:
        shortcut.relu = relu
        shortcut.weight.data *= 0.2  # so that float16 holds the gradients of all maps
    whole = whole.double() if dtype == torch.float64 else whole
    steps = copy.deepcopy(whole)
    steps.whole = False
    return whole, steps


def passes(module: Tails, zs: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs, and gradients and running statistics by name."""
    leaves = [z.clone(memory_format=torch.preserve_format).requires_grad_() for z in zs]
    ys = module(*leaves)
    weights = torch.linspace(-1, 1, ys.numel(), dtype=torch.float64).to(ys.dtype).view_as(ys)
    (ys * weights).sum().backward()
    found = {f"z{i}": leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}
    found |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return ys.detach(), found | {name: b.clone() for name, b in module.named_buffers()}


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_step_by_step(shape, dtype, layout, relu):
    """Forward the bits are the same. Backward sums are taken in another order."""
    whole, steps = both(shape, dtype, relu=relu)
    zs = maps_like(shape, NUM_MAPS, dtype, layout)
    (ys, found), (expected_ys, expected) = passes(whole, zs), passes(steps, zs)
    assert torch.equal(ys, expected_ys)
    assert found.keys() == expected.keys()
    terms = shape[0] * shape[2] * shape[3]
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].stride() == value.stride()
        if "running" in name or "tracked" in name:
            assert torch.equal(found[name], value), name
        else:
            # the gradient of a normalised map is a small difference of terms as large as that of the output
            scale = value.double().norm() + (terms * shape[1] / 3) ** 0.5 * name.startswith("z")
            error = (found[name].double() - value.double()).norm() / scale
            assert float(error) <= 16 * tolerance(dtype, terms * NUM_MAPS), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES[-2:])
def test_against_the_naive_composition(shape, training, layout):
    whole, naive = (Tails(4, channels=shape[1]).double().train(training) for _ in range(2))
    naive.fused = False
    zs = maps_like(shape, 4, torch.float64, layout)
    (ys, found), (expected_ys, expected) = passes(whole, zs), passes(naive, zs)
    torch.testing.assert_close(ys, expected_ys, rtol=1e-9, atol=1e-9)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].double(), value.double(), rtol=1e-8, atol=1e-9 * float(value.double().norm())
        )


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    """torch_threads(count): compute with so many threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strips_and_threads_do_not_change_a_bit(torch_threads, dtype):
    """Channels alone, few enough for one strip, have the bits that they have among others."""
    shape, few = (4, 600, 8, 8), slice(200, 300)
    zs = maps_like(shape, NUM_MAPS, dtype, torch.contiguous_format)
    whole = Tails(NUM_MAPS, channels=600)
    part = Tails(NUM_MAPS, channels=100)
    with torch.no_grad():
        for (name, own), other in zip(part.state_dict().items(), whole.state_dict().values(), strict=True):
            own.copy_(other[..., few] if "tracked" not in name else other)
    results = []
    for threads in (1, 2):
        torch_threads(threads)
        module = copy.deepcopy(whole)
        results.append(passes(module, zs))
    torch_threads(1)
    ys = Tails.forward(part, *[z[:, few].contiguous() for z in zs])
    assert torch.equal(ys, results[0][0][:, :, few])
    assert torch.equal(results[0][0], results[1][0])
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name]), name


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Those of `er_block_backward` for map 1 of three, with one later block."""
    x = torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(dtype)
    table = new_table(x, 3).fill_(0.5)
    later = LaterBlock(
        x,
        torch.empty(0, dtype=torch.uint8),
        torch.ones(3, 3),
        torch.ones(3, dtype=torch.float64),
        torch.ones(2, 3),
        *[torch.empty(0)] * 2,
        torch.ones(2, 3),
    )
    return {
        "index": 1, "z": x, "dy": x, "y": x.relu(), "a": torch.ones(2, 3), "later": [later], "passed": None,
        "table": table, "norm": BranchNorm.BATCH, "eps": 1e-5, "num_groups": 0, "dots": True, "measured": True,
        "needed": True,
    }  # fmt: skip


def er_block_backward(
    *, later: list[LaterBlock], before: Tensor | None = None, known: Tensor | None = None, **given: Any
) -> tuple[Tensor, ...]:
    """The operator, with later blocks one by one."""
    columns = [list(column) for column in zip(*later, strict=True)] if later else [[]] * len(LaterBlock._fields)
    first = [given[name] for name in ("index", "z", "dy", "y", "a")]
    last = [given[name] for name in ("table", "norm", "eps", "num_groups", "dots", "measured", "needed")]
    return torch.ops.ernet.er_block_backward.default(*first, *columns, given["passed"], before, known, *last)


def test_a_closed_gate_stops_anything():
    """What is infinite or NaN where the ReLU was closed takes no part in anything."""
    given = arguments()
    expected = er_block_backward(**given)
    spoilt = given["dy"].clone()
    spoilt[given["y"] == 0] = torch.nan
    for found, value in zip(er_block_backward(**given | {"dy": spoilt}), expected, strict=True):
        assert torch.equal(found, value)
    (later,) = given["later"]
    bits = expected[1]
    both = er_block_backward(**given | {"later": [later._replace(dy=given["dy"], relu_mask=bits)]})
    again = er_block_backward(**given | {"later": [later._replace(dy=spoilt, relu_mask=bits)]})
    assert all(torch.equal(found, value) for found, value in zip(both, again, strict=True))
    assert not torch.equal(both[0], expected[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    given = arguments()
    (later,) = given.pop("later")
    z, dy, y = (t.contiguous(memory_format=layout) for t in (given["z"], given["dy"], given["y"]))
    columns = [[column] for column in later._replace(dy=dy)]
    utils = ("test_schema", "test_faketensor")  # no autograd of their own: the nodes around them have it
    rest = (given["table"], given["norm"], given["eps"], 0, True, True)
    for own_dy, own_y, before, known, needed in (
        (dy, y, None, None, True),
        (dy, y, z, None, True),
        (dy, y, None, torch.ones(1, 3, dtype=torch.float64), True),
        (dy, None, z, None, False),
        (None, None, z, None, True),
    ):
        a = None if own_dy is None else given["a"]
        call = (given["index"], z, own_dy, own_y, a, *columns, None, before, known, *rest, needed)
        torch.library.opcheck(torch.ops.ernet.er_block_backward.default, call, test_utils=utils)


def test_dots_that_are_known_already():
    """Those that come with the gradient of the map after are those that the map's own call would take."""
    given = {
        name: v.to(memory_format=torch.channels_last) if name in ("z", "dy", "y") else v
        for name, v in arguments().items()
    }
    before = torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)
    (later,) = given["later"]
    given["later"] = [later._replace(dy=given["dy"])]
    with_dots = er_block_backward(**given, before=before)
    without = er_block_backward(**given)
    for found, expected in zip(with_dots[:5], without[:5], strict=True):
        torch.testing.assert_close(found, expected)
    g = [given["dy"] * (given["y"] > 0), given["dy"]]
    torch.testing.assert_close(with_dots[5].float(), torch.stack([(before * t).sum((0, 2, 3)) for t in g]))
    assert without[5].numel() == 0
    # the call for the map before, with and without them
    own = LaterBlock(
        given["dy"],
        with_dots[1],
        torch.ones(2, 3),
        with_dots[2],
        torch.ones(1, 3),
        *[torch.empty(0)] * 2,
        torch.ones(1, 3),
    )
    call = {**given, "index": 0, "z": before, "dy": None, "y": None, "a": None, "later": [own, given["later"][0]]}
    for found, expected in zip(er_block_backward(**call, known=with_dots[5]), er_block_backward(**call), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("wrong", [
    ({"dy": torch.ones(2, 3, 4, 5)}, "all maps must have one shape; dy has .2, 3, 4, 5."),
    ({"y": torch.ones(2, 3, 4, 4, dtype=torch.float64)}, "one dtype; y differs"),
    ({"passed": torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)}, "dense in one layout"),
    ({"a": None}, "a and dy go together"),
    ({"a": torch.ones(1, 3)}, "a must be contiguous tensors .> 1, 3. of float32; got .1, 3."),
    ({"table": torch.ones(3, 7, 4)}, "table must be a contiguous float64 tensor"),
    ({"index": 3}, "index 3 is outside the 3 maps"),
    ({"norm": 7}, "norm must be 0 .none., 1 .batch. or 2 .running.; got 7"),
    ({"dots": False}, "dy must be g itself"),
    ({"before": torch.ones(2, 3, 4, 5)}, "one shape; before has"),
    ({"known": torch.ones(2, 3).double()}, "known must have a row for each of the 1 later blocks; got .2, 3."),
    ({"z": torch.ones(0, 3, 4, 4), "dy": None, "y": None, "a": None, "later": []}, "must not be empty"),
])  # fmt: skip
def test_bad_input_of_the_operator(wrong):
    changed, message = wrong
    with pytest.raises(RuntimeError, match=message):
        er_block_backward(**arguments() | changed)


@pytest.mark.parametrize("field", ["relu_mask", "a", "db", "weight", "dweight", "running_mean"])
def test_bad_later_blocks(field):
    given = arguments()
    (later,) = given["later"]
    given["later"] = [later._replace(**{field: torch.ones(5, 2, 1)})]
    with pytest.raises(RuntimeError, match=f"later_{field.replace('relu_mask', 'bits')}"):
        er_block_backward(**given)


def test_bad_input_of_a_block():
    x = torch.ones(2, 3, 4, 4)
    shortcut = ShortcutArguments(torch.ones(1, 3), None, None, None, False, 0.1)
    table = new_table(x, 2)

    def block(maps: list[Tensor], filed: int = 0, weight: Tensor | None = shortcut.weight) -> None:
        given = shortcut._replace(weight=weight)
        torch.ops.ernet.er_block.default(maps, table, filed, True, True, *NO_NORM, *given, 1e-5, 0, True)

    block([x, x])
    for maps, filed, weight, message in [
        ([], 0, shortcut.weight, "at least one map"),
        ([x, x[:1]], 0, shortcut.weight, "one shape"),
        ([x, x], 2, shortcut.weight, "filed must be 0 to 1"),
        ([x, x], 0, None, "weight is missing"),
        ([x, x], 0, torch.ones(2, 3), "weight must have shape"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            block(maps, filed, weight)


def test_another_shortcut_than_the_stage_was_started_with():
    maps = StageMaps(fused=True)
    x = torch.randn(2, 6, 3, 3)
    maps.start(x, [ERShortcut(6, 1)])
    with pytest.raises(ValueError, match="not the shortcut that map 1 of the stage was started with"):
        maps.add(x, nn.BatchNorm2d(6), ERShortcut(6, 1))


@pytest.mark.parametrize("norm", ["batch", "batch" + STEPS])
@pytest.mark.parametrize(
    "wanted", ["shortcuts.2.weight", "shortcuts.0.weight", "bns.1.weight", "bns.0.bias", "z0", "z2"]
)
def test_gradients_of_a_part(norm, wanted):
    """autograd.grad of one tensor runs the nodes on the way to it, and no others."""
    found = []
    for module in tails(4, norm):
        zs = [z.requires_grad_() for z in maps_like((2, 6, 3, 5), 4, torch.float64, torch.contiguous_format)]
        named = dict(module.named_parameters()) | {f"z{i}": z for i, z in enumerate(zs)}
        found.append(torch.autograd.grad(module(*zs)[-1].square().sum(), named[wanted])[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


EVERY_LOOP = """
for dtype in tests.DTYPES:
    for layout in tests.LAYOUTS:
        for shape in tests.SHAPES[:2] + tests.SHAPES[3:4]:
            tests.test_as_step_by_step(shape, dtype, layout, True)
        tests.test_against_the_naive_composition((2, 37, 5, 7), True, layout)
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    run_on(isa, __file__, EVERY_LOOP)
