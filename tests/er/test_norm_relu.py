"""BatchNorm and ReLU in one pass, alone and with a projection's sum between, against PyTorch's modules in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from er_cases import DTYPES, LAYOUTS, SHAPES, maps_like, relative_error, tolerance
from stage_cases import step_by_step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from traffic import bytes_moved

from ernet_fast import _backend
from ernet_fast.er.norm_relu import batch_norm_relu, projection_sum, sum_relu

compiled = pytest.mark.skipif(not _backend.extension_available(), reason=str(_backend.why_unavailable()))

MODES = ["train", "eval", "frozen vectors", "frozen", "frozen, gamma learns", "untracked", "not affine", "cumulative"]


class NormReLU(nn.Module):
    """Calls the operators, or with `modules` the modules that they stand for."""

    def __init__(self, channels: int, mode: str, num_maps: int, mode_s: str | None = None) -> None:
        super().__init__()
        self.bns = nn.ModuleList(batch_norm(channels, m, i) for i, m in enumerate([mode, mode_s or mode][:num_maps]))
        self.relu = nn.ReLU(inplace=True)
        self.modules_alone, self.whole = False, True

    def forward(self, *zs: Tensor) -> Tensor:
        if self.modules_alone:
            x: Tensor = self.relu(sum(bn(z) for bn, z in zip(self.bns, zs, strict=True)))
            return x
        if len(zs) == 1:
            return batch_norm_relu(zs[0], self.bns[0], self.relu)
        with step_by_step(not self.whole):
            return projection_sum(zs[0], self.bns[0], zs[1], self.bns[1], self.relu)


def batch_norm(channels: int, mode: str, seed: int) -> nn.BatchNorm2d:
    options = {
        "untracked": {"track_running_stats": False},
        "not affine": {"affine": False},
        "cumulative": {"momentum": None},
    }.get(mode, {})
    bn = nn.BatchNorm2d(channels, eps=1e-3, **options)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*bn.named_parameters(), *bn.named_buffers()]:
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator) + 0.5
            tensor.data.copy_(noise if name != "bias" else noise - 1)
    if bn.weight is not None and channels > 1:
        bn.weight.data[0] = -0.5
    if mode in ("eval", "frozen", "frozen, gamma learns"):
        bn.eval()
    if mode.startswith("frozen"):
        bn.requires_grad_(False)
    if mode == "frozen, gamma learns":
        bn.weight.requires_grad_()
    return bn


def run(module: NormReLU, zs: list[Tensor], dy: Tensor, needed: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and gradients and buffers by name."""
    leaves = [z.clone(memory_format=torch.preserve_format).requires_grad_(needed) for z in zs]
    y = module(*leaves)
    if y.requires_grad:
        y.backward(dy)
    found = {f"z{i}": leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}
    found |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return y.detach(), found | {name: b.clone() for name, b in module.named_buffers()}


def compare(module: NormReLU, zs: list[Tensor], dy: Tensor, needed: bool = True) -> None:
    """`module` against the modules in float64, on the same values, twice: statistics and gradients go on."""
    reference = copy.deepcopy(module).double()
    reference.modules_alone = True
    dtype = zs[0].dtype
    if dtype == torch.float64:
        module.double()
    terms = zs[0].numel() // zs[0].shape[1]
    for _ in range(2):
        y, found = run(module, zs, dy, needed)
        y_wanted, wanted = run(reference, [z.double() for z in zs], dy.double(), needed)
        assert y.dtype == dtype and y.stride() == zs[0].stride()
        assert relative_error(y, y_wanted) <= 2 * tolerance(dtype, terms)
        assert found.keys() == wanted.keys()
        # sums of a channel cancel: what they miss is a rounding of their terms, not of themselves
        scale = max([float(v.norm()) for name, v in wanted.items() if name.startswith("z")], default=0.0)
        for name, value in wanted.items():
            if name.endswith("num_batches_tracked"):
                assert torch.equal(found[name], value), name
                continue
            bound = 2 * tolerance(dtype, terms, stored=name.startswith("z"))
            size = float(value.norm()) if "running" in name else max(float(value.norm()), scale)
            assert float((found[name].double() - value).norm()) <= bound * size, name


@compiled
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s != (5, 33, 1, 1)])  # five values: no statistics to speak of
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_values_and_gradients(mode, shape, dtype, layout):
    z, dy = maps_like(shape, 2, dtype, layout)
    compare(NormReLU(shape[1], mode, 1), [z], dy)


@compiled
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("needed", [True, False], ids=["", "input without gradient"])
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, needed, layout):
    z, dy = maps_like((3, 5, 9, 6), 2, torch.float64, layout)
    compare(NormReLU(5, mode, 1), [z], dy, needed)


@compiled
@pytest.mark.parametrize("whole", [True, False], ids=["", "by steps"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 7, 11), (2, 64, 9, 9), (1, 1030, 2, 3), (2, 37, 14, 14), (1, 2, 61, 67)])
def test_values_and_gradients_of_a_projection(shape, dtype, layout, whole):
    z, s, dy = maps_like(shape, 3, dtype, layout)
    module = NormReLU(shape[1], "train", 2)
    module.whole = whole
    compare(module, [z, s], dy)


@compiled
@pytest.mark.parametrize("whole", [True, False], ids=["", "by steps"])
@pytest.mark.parametrize("needed", [True, False], ids=["", "inputs without gradient"])
@pytest.mark.parametrize("mode_s", MODES)
@pytest.mark.parametrize("mode", MODES)
def test_modes_of_a_projection(mode, mode_s, needed, whole):
    z, s, dy = maps_like((3, 5, 9, 6), 3, torch.float64, torch.channels_last)
    module = NormReLU(5, mode, 2, mode_s)
    module.whole = whole
    compare(module, [z, s], dy, needed)


def operators(call: Callable[[], object]) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        call()
    names = [event.name for event in profile.events()]
    return [name for name in names if name.startswith("ernet::") or "batch_norm" in name or "relu" in name]


@compiled
@pytest.mark.parametrize("num_maps", [1, 2])
def test_one_operator_each_way(num_maps):
    """And none of PyTorch's: forward one, backward one a map."""
    module = NormReLU(6, "train", num_maps)
    zs = [z.requires_grad_() for z in maps_like((2, 6, 8, 8), num_maps, torch.float32, torch.channels_last)]
    assert operators(lambda: module(*zs).sum().backward()) == [
        "ernet::er_block",
        *["ernet::er_block_backward"] * num_maps,
    ]
    module.eval()
    with torch.no_grad():
        assert operators(lambda: module(*zs)) == ["ernet::er_block"]


@compiled
@pytest.mark.parametrize("num_maps", [1, 2])
def test_the_maps_and_the_result_are_all_that_is_kept(num_maps):
    module = NormReLU(6, "train", num_maps)
    zs = [z.requires_grad_() for z in maps_like((2, 6, 8, 8), num_maps, torch.float32, torch.channels_last)]
    kept: dict[int, int] = {}

    def count(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        y = module(*zs)
    maps = [pointer for pointer, numel in kept.items() if numel == zs[0].numel()]
    assert sorted(maps) == sorted(t.data_ptr() for t in (*zs, y))


@compiled
@pytest.mark.parametrize("num_maps", [1, 2])
def test_gradcheck_and_no_second_derivative(num_maps):
    module = NormReLU(3, "train", num_maps).double()
    zs = [z.requires_grad_() for z in maps_like((2, 3, 3, 4), num_maps, torch.float64, torch.contiguous_format)]
    vectors = [p.detach().clone().requires_grad_() for p in module.parameters()]

    def call(*inputs: Tensor) -> Tensor:
        parameters = dict(zip(dict(module.named_parameters()), inputs[num_maps:], strict=True))
        return torch.func.functional_call(module, parameters, inputs[:num_maps])

    assert torch.autograd.gradcheck(call, (*zs, *vectors))
    (dz,) = torch.autograd.grad(module(*zs).square().sum(), zs[:1], create_graph=False, retain_graph=True)
    assert not dz.requires_grad
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(module(*zs).square().sum(), zs[:1], create_graph=True)


@compiled
@pytest.mark.parametrize("num_maps", [1, 2])
def test_retained_graph_and_checkpoint(num_maps):
    zs = [z.requires_grad_() for z in maps_like((2, 6, 8, 8), num_maps, torch.float64, torch.channels_last)]
    module = NormReLU(6, "train", num_maps).double()
    loss = module(*zs).square().sum()
    once = torch.autograd.grad(loss, zs, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(once, torch.autograd.grad(loss, zs), strict=True))
    again = torch.autograd.grad(checkpoint(module, *zs, use_reentrant=False).square().sum(), zs)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@compiled
def test_inputs_in_other_layouts():
    z, s, dy = maps_like((3, 5, 9, 6), 3, torch.float64, torch.contiguous_format)
    module = NormReLU(5, "train", 2).double()
    y, wanted = run(copy.deepcopy(module), [z, s], dy)
    channels_last = {"memory_format": torch.channels_last}
    for zs in ([z.contiguous(**channels_last), s], [z, s.contiguous(**channels_last)]):
        found_y, found = run(copy.deepcopy(module), zs, dy.contiguous(**channels_last))
        torch.testing.assert_close(found_y, y)
        torch.testing.assert_close(found, wanted)
    strided = torch.cat([z, z], dim=3)[..., ::2]
    one = NormReLU(5, "train", 1).double()
    torch.testing.assert_close(one(strided), one(strided.contiguous()))


@pytest.mark.parametrize("num_maps", [1, 2])
@pytest.mark.parametrize("where", ["bns.0", "relu", "everywhere"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_are_called(kind, where, num_maps):
    """A module that somebody watches is called, as though nothing were fused."""
    module = NormReLU(6, "train", num_maps)
    module.relu = nn.ReLU()  # PyTorch refuses a hook on the way back beside a ReLU in place
    alone = copy.deepcopy(module)
    alone.modules_alone = True
    zs = [z.requires_grad_() for z in maps_like((2, 6, 8, 8), num_maps, torch.float32, torch.channels_last)]
    called: list[nn.Module] = []

    def hook(of: nn.Module, *_: object) -> None:
        called.append(of)

    watched = [m for name, m in module.named_modules() if name.startswith(("bns.", "relu"))]
    if where == "everywhere":
        handle = getattr(torch.nn.modules.module, f"register_module_{kind}_hook")(hook)
    else:
        watched = [module.get_submodule(where)]
        handle = getattr(watched[0], f"register_{kind}_hook")(hook)
    try:
        y = module(*zs)
        gradients = torch.autograd.grad(y.square().sum(), zs)
    finally:
        handle.remove()
    assert all(any(of is one for of in called) for one in watched)
    wanted = alone(*zs)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted.square().sum(), zs))


@compiled
@pytest.mark.parametrize(("num_maps", "accesses"), [(1, 6), (2, 10)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_moved(layout, num_maps, accesses):
    """What the floor of bench_er_norms counts, every argument and result of an operator once, and bits and vectors."""
    module = NormReLU(64, "train", num_maps)
    *zs, dy = maps_like((4, 64, 32, 32), num_maps + 1, torch.float32, layout)
    zs = [z.requires_grad_() for z in zs]
    # channels-last, the pass that writes dz reads s for its dots
    accesses += layout == torch.channels_last and num_maps == 2
    moved = bytes_moved(lambda: module(*zs).backward(dy)) / (dy.numel() * dy.element_size())
    assert accesses <= moved <= accesses + 0.2


class _OwnReLU(nn.ReLU):
    pass


class _OwnNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("num_maps", [1, 2])
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("relu", nn.GELU()),
        ("relu", _OwnReLU()),
        ("relu", nn.Identity()),
        ("bns.0", _OwnNorm(6)),
        ("bns.0", nn.GroupNorm(2, 6)),
        ("bns.0", nn.Identity()),
        ("bns.0", nn.SyncBatchNorm(6)),
    ],
)
def test_other_modules_are_called(name, other, num_maps):
    module = NormReLU(6, "eval", num_maps).eval()
    owner, _, child = name.rpartition(".")
    module.get_submodule(owner)._modules[child] = other.eval()
    alone = copy.deepcopy(module)
    alone.modules_alone = True
    zs = maps_like((2, 6, 8, 8), num_maps, torch.float32, torch.channels_last)
    assert torch.equal(module(*zs), alone(*zs))


@pytest.mark.parametrize("num_maps", [1, 2])
@pytest.mark.parametrize("shape", [(1, 6, 1, 1), (2, 5, 8, 8), (6, 8, 8)])
def test_what_a_batch_norm_refuses(shape, num_maps):
    """One value a channel, other channels, no batch: PyTorch's own errors."""
    module = NormReLU(6, "train", num_maps)
    alone = copy.deepcopy(module)
    alone.modules_alone = True
    zs = [torch.randn(shape) for _ in range(num_maps)]
    errors = []
    for tried in (module, alone):
        before = copy.deepcopy(tried.bns[0].state_dict())
        with pytest.raises((ValueError, RuntimeError)) as caught:
            tried(*zs)
        errors.append((type(caught.value), str(caught.value)))
        assert all(torch.equal(v, before[k]) or "tracked" in k for k, v in tried.bns[0].state_dict().items())
    assert errors[0] == errors[1]


@pytest.mark.parametrize("num_maps", [1, 2])
def test_empty_batch_and_single_value_in_evaluation(num_maps):
    module = NormReLU(6, "eval", num_maps)
    assert module(*[torch.empty(0, 6, 4, 4)] * num_maps).shape == (0, 6, 4, 4)
    zs = maps_like((1, 6, 1, 1), num_maps, torch.float64, torch.contiguous_format)
    compare(module, zs, torch.ones_like(zs[0]))


@pytest.mark.parametrize("num_maps", [1, 2])
def test_compiled_programs_trace_the_modules(num_maps):
    torch._dynamo.reset()
    module = NormReLU(6, "train", num_maps)
    zs = maps_like((2, 6, 8, 8), num_maps, torch.float32, torch.channels_last)
    traced = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(traced(*zs), module(*zs))


@compiled
@pytest.mark.parametrize("num_maps", [1, 2])
def test_autocast_and_inference_mode(num_maps):
    module = NormReLU(6, "train", num_maps)
    zs = maps_like((2, 6, 8, 8), num_maps, torch.bfloat16, torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(*zs).dtype == torch.bfloat16
    with torch.inference_mode():
        inside = NormReLU(6, "train", num_maps)
        inside(*[z.clone() for z in zs])
        assert int(inside.bns[0].num_batches_tracked) == 1
    version = module.bns[0].running_mean._version
    module(*zs)
    assert module.bns[0].running_mean._version > version


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_relu(dtype, layout):
    """The bits of the sum and the ReLU of PyTorch, whether one pass or two, NaN included; inputs stay as they are."""
    z, s = maps_like((2, 19, 5, 7), 2, dtype, layout)
    z[0, 0, 0, 0], s[1, 3, 2, 2] = float("nan"), float("-inf")
    before, expected = (z.clone(), s.clone()), torch.relu(z + s)
    replaced = nn.Sequential(nn.ReLU())  # not plain: it is called
    for relu in (nn.ReLU(inplace=True), replaced):
        for grad in (False, True):
            inputs = z.clone().requires_grad_(grad), s.clone().requires_grad_(grad)
            y = sum_relu(*inputs, relu)
            torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
            assert y.requires_grad == grad
            if grad:
                y.nan_to_num().sum().backward()
                torch.testing.assert_close(inputs[0].grad, inputs[1].grad, equal_nan=True)
            for found, own in zip(inputs, before, strict=True):
                torch.testing.assert_close(found.detach(), own, rtol=0, atol=0, equal_nan=True)
    assert sum_relu(z[:0], s[:0], nn.ReLU()).shape == (0, 19, 5, 7)
    other = s.contiguous(memory_format=LAYOUTS[0] if layout is LAYOUTS[1] else LAYOUTS[1])
    torch.testing.assert_close(sum_relu(z, other, nn.ReLU()), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_maps", [1, 2])
def test_on_a_gpu(num_maps, dtype, layout):
    *zs, dy = (x.cuda() for x in maps_like((4, 66, 14, 14), num_maps + 1, dtype, layout))
    compare(NormReLU(66, "train", num_maps).cuda(), zs, dy)
