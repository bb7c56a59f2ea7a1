"""The fused path, the composed path and the reference network agree in outputs, gradients and running statistics."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ernet_fast.models import ERResNet, ERStage
from ernet_fast.models.resnet import FAMILY, LAYERS
from ernet_fast.reference.er_network import (
    NaiveERResNet,
    NaiveERStage,
    naive_er_resnet,
    state_dict_from_fused,
    state_dict_to_fused,
)

# Reductions here are shorter than 1e4 values and the stages a dozen operations deep: float64 rounds to about 1e-13.
OUTPUTS, TOLERANCE = 1e-12, 1e-10  # the second of gradients and statistics
ROUNDING = 1e3 * torch.finfo(torch.float64).eps  # of sums of at most a thousand terms

BLOCKS = ("basic", "bottleneck", "er133")
NORMS = (("batch", None), ("group", 1), ("group", 2), ("group", 8))
CHANNELS, WIDTH, NUM_BLOCKS = 8, {"basic": 8, "bottleneck": 3, "er133": 3}, 4


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach() - expected.detach()).norm() / expected.detach().norm())


def assert_same_gradients(found: nn.Module, expected: nn.Module) -> None:
    """Each within TOLERANCE, plus rounding of the largest one.

    Where a BatchNorm or a normaliser removes what a parameter does, its gradient is a sum of terms that cancel.
    """
    gradients = {name: p.grad for name, p in expected.named_parameters() if p.grad is not None}
    scale = max(float(gradient.norm()) for gradient in gradients.values())
    for name, parameter in found.named_parameters():
        assert (parameter.grad is not None) == (name in gradients), name
        if parameter.grad is None:
            continue
        error = float((parameter.grad - gradients[name]).norm())
        size = float(gradients[name].norm())
        assert error <= TOLERANCE * size + ROUNDING * scale, name


def assert_same_buffers(found: nn.Module, reference: nn.Module) -> None:
    expected = state_dict_to_fused(reference.state_dict())
    state = found.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(state[name], value), name
        elif "running" in name:
            assert relative(state[name], value) < TOLERANCE, name


def randomise(model: nn.Module, seed: int) -> None:
    """Parameters far from their initial values, where 1s and 0s could hide an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.mul_(0.5).add_(noise * (0.5 if parameter.ndim < 3 else 0.05))
            if name.endswith("bn3.weight") and parameter.numel() > 1:
                parameter[0].neg_()


def stages(block: str, norm: str, num_groups: int | None, seed: int = 0, **kw: object) -> Iterator[nn.Module]:
    """A fused stage, a composed one and the reference, with the same parameters."""
    width = WIDTH[block]
    torch.manual_seed(seed)
    fused = ERStage(5, CHANNELS, NUM_BLOCKS, width=width, block=block, norm=norm, num_groups=num_groups, **kw)
    composed = ERStage(
        5, CHANNELS, NUM_BLOCKS, width=width, block=block, norm=norm, num_groups=num_groups, fused=False, **kw
    )
    reference = NaiveERStage(5, width, CHANNELS, NUM_BLOCKS, block=block, norm=norm, num_groups=num_groups, **kw)
    fused.double()
    randomise(fused, seed)
    composed.double().load_state_dict(fused.state_dict())
    reference.double().load_state_dict(state_dict_from_fused(fused.state_dict()))
    yield from (fused, composed, reference)


def images(shape: tuple[int, ...], layout: torch.memory_format, seed: int = 1) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.contiguous(memory_format=layout)


def run(stage: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input, for a loss that weighs every value differently; parameters keep theirs."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    stage.zero_grad()
    y = stage(x)
    weights = images(tuple(y.shape), torch.contiguous_format, seed=7).to(y.dtype)
    (y * weights).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def compare(models: list[nn.Module], x: Tensor) -> None:
    *tried, reference = models
    y, dx = run(reference, x)
    for model in tried:
        found, found_dx = run(model, x)
        assert relative(found, y) < OUTPUTS
        assert relative(found_dx, dx) < TOLERANCE
        assert_same_gradients(model, reference)
        assert_same_buffers(model, reference)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("norm", "num_groups"), NORMS)
@pytest.mark.parametrize("block", BLOCKS)
def test_training_and_evaluation(block: str, norm: str, num_groups: int | None, layout: torch.memory_format) -> None:
    models = list(stages(block, norm, num_groups, stride=2))
    optimisers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in models]
    for step in range(3):
        compare(models, images((3, 5, 13, 9), layout, seed=step))
        for optimiser in optimisers:
            optimiser.step()
    for model in models:
        model.eval()
    compare(models, images((2, 5, 7, 11), layout))


@pytest.mark.parametrize("shape", [(1, 5, 7, 11), (1, 5, 1, 2), (2, 5, 1, 1), (4, 5, 7, 7), (5, 5, 16, 1)])
@pytest.mark.parametrize(("norm", "num_groups"), [("batch", None), ("group", 2)])
def test_odd_shapes(norm: str, num_groups: int | None, shape: tuple[int, ...]) -> None:
    models = list(stages("bottleneck", norm, num_groups))
    compare(models, images(shape, torch.channels_last))
    for model in models:
        model.eval()
    compare(models, images(shape, torch.contiguous_format))


@pytest.mark.parametrize("shape", [(1, 5, 1, 1), (0, 5, 4, 4)])
def test_single_value_and_empty_batch_in_evaluation(shape: tuple[int, ...]) -> None:
    models = [model.eval() for model in stages("basic", "batch", None)]
    expected = models[-1](images(shape, torch.contiguous_format))
    for model in models[:-1]:
        torch.testing.assert_close(
            model(images(shape, torch.contiguous_format)), expected, rtol=TOLERANCE, atol=TOLERANCE
        )


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_frozen_batch_norm(norm: str) -> None:
    """BatchNorms in evaluation mode with constant parameters, shortcuts still training."""
    models = list(stages("bottleneck", norm, 2 if norm == "group" else None))
    x = images((3, 5, 6, 5), torch.channels_last)
    compare(models, x)
    for model in models:
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d) and ".shortcut." not in name:
                module.eval()
                module.requires_grad_(False)
    before = models[0].state_dict()["1.bn3.running_mean"].clone()
    *tried, reference = models
    y, dx = run(reference, x)
    for model in tried:
        found, found_dx = run(model, x)
        assert relative(found, y) < OUTPUTS
        assert relative(found_dx, dx) < TOLERANCE
        assert_same_buffers(model, reference)
        assert_same_gradients(model, reference)
    assert torch.equal(models[0].state_dict()["1.bn3.running_mean"], before)


def test_only_shortcuts_train() -> None:
    models = list(stages("basic", "batch", None))
    x = images((2, 5, 6, 5), torch.contiguous_format)
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("shortcut" in name)
    *tried, reference = models
    reference(x).square().sum().backward()
    for model in tried:
        model(x).square().sum().backward()
        assert_same_gradients(model, reference)


def test_networks() -> None:
    kw = {"num_classes": 4, "in_channels": 2, "base_channels": 4}
    for family in ("basic", "bottleneck"):
        torch.manual_seed(3)
        fused = ERResNet(family, (2, 3, 1, 2), **kw).double()
        randomise(fused, 3)
        composed = ERResNet(family, (2, 3, 1, 2), fused=False, **kw).double()
        reference = NaiveERResNet((2, 3, 1, 2), family, **kw).double()
        composed.load_state_dict(fused.state_dict())
        reference.load_state_dict(state_dict_from_fused(fused.state_dict()))
        x = images((2, 2, 45, 70), torch.channels_last)
        compare([fused, composed, reference], x)
        for model in (fused, composed, reference):
            model.eval()
        compare([fused, composed, reference], x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(("norm", "num_groups"), [("batch", None), ("group", 2)])
@pytest.mark.parametrize("depth", LAYERS)
def test_every_depth(depth: int, norm: str, num_groups: int | None, layout: torch.memory_format) -> None:
    kw = {"num_classes": 3, "base_channels": 4, "norm": norm, "num_groups": num_groups}
    torch.manual_seed(depth)
    models = [ERResNet(FAMILY[depth], LAYERS[depth], memory=memory, **kw).double() for memory in ("usual", "lean")]
    reference = naive_er_resnet(depth, **kw).double()
    models[1].load_state_dict(models[0].state_dict())
    reference.load_state_dict(state_dict_from_fused(models[0].state_dict()))
    # 36 values a channel in the last stage: statistics of a handful would magnify roundings
    compare([*models, reference], images((4, 3, 96, 96), layout))


def test_set_fused_changes_the_path_and_not_the_result() -> None:
    model = ERResNet("basic", (2, 2, 1, 1), 3, base_channels=4).double()
    assert [stage.fused for stage in model.stages] == [True] * 4
    x = images((2, 3, 32, 32), torch.contiguous_format)
    expected = model(x)
    model.set_fused(False)
    assert [stage.fused for stage in model.stages] == [False] * 4
    assert relative(model(x), expected) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("norm", "num_groups"), [("batch", None), ("group", 2)])
@pytest.mark.parametrize("block", BLOCKS)
def test_shorter_dtypes(block: str, norm: str, num_groups: int | None, dtype: torch.dtype) -> None:
    """Against the float64 reference: about eight roundings in series a block, and as many again in backward."""
    fused, _, reference = stages(block, norm, num_groups, stride=2)
    x = images((3, 5, 13, 9), torch.channels_last)
    y, dx = run(reference, x)
    found, found_dx = run(fused.to(dtype), x.to(dtype))
    assert found.dtype == found_dx.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert relative(found.double(), y) < 8 * NUM_BLOCKS * eps
    if dtype == torch.float32:  # in bfloat16 values near zero change sign, and with them whole terms of the gradient
        assert relative(found_dx.double(), dx) < 16 * NUM_BLOCKS * eps


def test_autocast() -> None:
    torch.manual_seed(0)
    model = ERResNet("basic", (2, 3, 1, 1), 3, base_channels=8)
    expected = model(x := torch.randn(4, 3, 64, 64)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert relative(logits.float(), expected) < 32 * torch.finfo(torch.bfloat16).eps
