"""lean_memory: the same gradients, bit for bit, from fewer kept maps; what backward cannot compute again is noticed."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import pytest
import torch
from torch import nn

from ernet_fast import ERStage, _backend
from ernet_fast.er import lean as lean_module
from ernet_fast.er.lean import lean_memory
from ernet_fast.models import ERResNet

pytestmark = pytest.mark.skipif(not _backend.extension_available(), reason="the compiled operators are not built")
LAYOUTS = {"planar": torch.contiguous_format, "channels-last": torch.channels_last}


def small(norm: str = "batch", family: str = "bottleneck", **options) -> ERResNet:
    torch.manual_seed(0)
    return ERResNet(
        family, (2, 3, 1, 2), 5, norm=norm, num_groups=4 if norm == "group" else None, base_channels=8, **options
    )


def images(dtype=torch.float32, layout="planar") -> torch.Tensor:
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()


def gradients(model: nn.Module, x: torch.Tensor, *, lean: bool) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    x.grad = None
    if lean:
        with lean_memory():
            y = model(x)
    else:
        y = model(x)
    y.square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(a, b, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("family", ["basic", "bottleneck"])
def test_gradients_and_statistics_are_the_same_bits(family, norm, layout):
    usual = small(norm, family).to(memory_format=LAYOUTS[layout])
    lean = copy.deepcopy(usual)
    for _ in range(2):
        assert_same(
            gradients(lean, images(layout=layout), lean=True), gradients(usual, images(layout=layout), lean=False)
        )
    assert all(torch.equal(a, b) for a, b in zip(usual.buffers(), lean.buffers(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    usual = small().to(dtype)
    lean = copy.deepcopy(usual)
    assert_same(gradients(lean, images(dtype), lean=True), gradients(usual, images(dtype), lean=False))


def test_autocast():
    usual = small()
    lean = copy.deepcopy(usual)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(gradients(lean, images(), lean=True), gradients(usual, images(), lean=False))


@pytest.mark.parametrize("change", ["eval", "frozen statistics", "frozen stem", "fused=False", "hook", "checkpointing"])
def test_any_state_of_the_network(change):
    usual = small()
    if change == "eval":
        usual.eval()
    elif change == "frozen statistics":
        for module in usual.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    elif change == "frozen stem":
        for p in (*usual.conv1.parameters(), *usual.bn1.parameters(), *usual.layer1.parameters()):
            p.requires_grad_(False)
    elif change == "fused=False":
        usual.set_fused(False)
    elif change == "checkpointing":
        usual.set_grad_checkpointing()
    lean = copy.deepcopy(usual)
    if change == "hook":  # puts another map in the place of one that would be computed again
        for model in (usual, lean):
            model.layer2[1].register_forward_hook(lambda module, given, y: y * 0.5)
    x, z = images(), images()
    found, expected = [], []
    for result, model, given, is_lean in ((found, lean, x, True), (expected, usual, z, False)):
        model.zero_grad(set_to_none=True)
        if is_lean:
            with lean_memory():
                y = model(given)
        else:
            y = model(given)
        y.square().sum().backward()
        result += [given.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    assert_same(found, expected)


def test_retained_graphs_and_threads():
    model = small()
    expected = gradients(model, images(), lean=False)
    x = images()
    with lean_memory():
        loss = model(x).square().sum()
    wanted = [x, *model.parameters()]
    passes = [torch.autograd.grad(loss, wanted, retain_graph=True) for _ in range(2)]
    at_once: list = []
    threads = [
        threading.Thread(target=lambda: at_once.append(torch.autograd.grad(loss, wanted, retain_graph=True)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(at_once) == 2
    for found in (*passes, *at_once):
        assert_same(list(found), expected)


def test_a_pass_over_a_part_of_the_graph():
    model = small()
    x = images()
    with lean_memory():
        features = model.forward_features(x)
    (found,) = torch.autograd.grad(features.sum(), [model.layer4[1].conv1.weight], retain_graph=True)
    again = torch.autograd.grad(features.sum(), [model.layer4[1].conv1.weight, x])
    assert torch.equal(found, again[0])


def test_fewer_maps_are_kept():
    """Raw maps alone: those of the stem and of stages, and what pooling returns."""
    model = small()
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    usual: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        usual[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images())
    lean: dict[int, int] = {}
    with lean_memory():
        y = model(images())
    for handle in gc.get_objects():
        if type(handle) in (lean_module._Saved, lean_module._Narrowed):
            storage = handle._tensor.untyped_storage()
            lean[storage._cdata] = storage.nbytes()
    assert y.requires_grad
    kept, all_of_them = (sum(size for key, size in found.items() if key not in parameters) for found in (lean, usual))
    assert 0.3 * all_of_them < kept < 0.65 * all_of_them


def test_a_map_that_is_written_to_in_place_is_not_taken_for_what_it_was():
    """The epilogue's own ReLU is that of the map before, which it computes again; usually this is an error."""
    model, weight = small(), torch.ones(4, 32, 1, 1)
    x = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(2))
    with lean_memory():
        nn.functional.conv2d(model.layer1(x).mul_(-2), weight.requires_grad_()).sum().backward()
    found = [weight.grad, *(p.grad for p in model.layer1.parameters())]
    weight.grad = None
    model.zero_grad()
    nn.functional.conv2d(model.layer1(x) * -2, weight).sum().backward()
    assert_same(found, [weight.grad, *(p.grad for p in model.layer1.parameters())])


def test_an_input_that_is_written_to_before_backward_is_refused():
    conv = nn.Conv2d(3, 4, 1)
    x = torch.randn(1, 3, 4, 4)
    with lean_memory():
        y = conv(x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        y.backward()


def test_indices_of_a_pooling_take_fewer_bytes():
    x = torch.randn(1, 64, 64, 64, requires_grad=True)
    with lean_memory():
        y, indices = nn.functional.max_pool2d(x, 2, return_indices=True)
    assert indices.dtype == torch.int64 and y.numel() >= 1 << 16
    (found,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(nn.functional.max_pool2d(x, 2).sum(), x)
    assert torch.equal(found, expected)


def test_functions_inside_are_left_alone():
    """torch.func has no hooks on saved tensors, and says so itself; without gradients nothing is remembered."""
    model = small().eval()
    with torch.no_grad(), lean_memory():
        y = model(images())
    assert torch.equal(y, model(images()).detach())


def test_a_network_chooses():
    usual, lean = small(), small(memory="lean")
    assert (usual.memory, lean.memory) == ("usual", "lean")
    assert_same(gradients(lean, images(), lean=False), gradients(usual, images(), lean=False))
    maps = lean.forward_intermediates(images(), [1, 3], intermediates_only=True)
    weight = lean.layer1[1].shortcut.weight
    (found,) = torch.autograd.grad(maps[1].sum(), [weight])
    expected = usual.forward_intermediates(images(), [1, 3], intermediates_only=True)[1]
    assert torch.equal(found, torch.autograd.grad(expected.sum(), [usual.layer1[1].shortcut.weight])[0])
    with pytest.raises(ValueError, match="memory must be one of"):
        lean.set_memory("little")


def test_a_network_of_a_version_without_the_choice_is_restored():
    model = small()
    del model.__dict__["memory"]
    restored = pickle.loads(pickle.dumps(model))
    assert restored.memory == "usual"
    assert restored(images()).requires_grad


def test_transforms_and_programs():
    """Where hooks on saved tensors are not allowed, or maps are traced, the choice is without effect."""
    model = small(memory="lean").eval()
    x = images().detach()
    parameters = dict(model.named_parameters())

    def loss(values):
        return torch.func.functional_call(model, values, (x,)).square().sum()

    found = torch.func.grad(loss)(parameters)
    model.zero_grad()
    loss(parameters).backward()
    torch.testing.assert_close(found["conv1.weight"], model.conv1.weight.grad, rtol=1e-4, atol=1e-4)
    program = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_autograd():
    """A backward pass that is compiled unpacks what was saved as an eager one does."""
    compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd")
    stage = ERStage(4, 8, 2, block="basic")
    x = torch.randn(2, 4, 6, 5, requires_grad=True)
    wanted = [x, *stage.parameters()]
    expected = torch.autograd.grad(stage(x).square().sum(), wanted)
    with lean_memory():
        loss = stage(x).square().sum()
    torch._dynamo.reset()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        found = torch.autograd.grad(loss, wanted)
    torch._dynamo.reset()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
