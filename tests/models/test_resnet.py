from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn

import ernet_fast.models
from ernet_fast.models import ERResNet, ERStage, er_resnet18, er_resnet50
from ernet_fast.models.drop_path import DropPath

SMALL = {"num_classes": 5, "base_channels": 8}


def small(family: str = "basic", **kw: object) -> ERResNet:
    torch.manual_seed(0)
    return ERResNet(family, (2, 3, 1, 2), **(SMALL | kw))


def on_meta(depth: int, **kw: object) -> ERResNet:
    with torch.device("meta"):
        return getattr(ernet_fast.models, f"er_resnet{depth}")(**kw)


# Published counts of the plain networks, and the ER weights that `sum over stages of C * L (L - 1) / 2` gives.
COUNTS = {
    18: (11_689_512, 960),
    34: (21_797_672, 6_336),
    50: (25_557_032, 25_344),
    101: (44_549_160, 269_056),
    152: (60_192_808, 666_368),
}
MILLIONS = {18: 11.69, 34: 21.80, 50: 25.58, 101: 44.82, 152: 60.86}


@pytest.mark.parametrize("depth", COUNTS)
def test_parameter_counts(depth: int) -> None:
    model = on_meta(depth)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    shortcuts = sum(size for name, size in sizes.items() if ".shortcut." in name)
    assert (sum(sizes.values()) - shortcuts, shortcuts) == COUNTS[depth]
    assert round(sum(sizes.values()) / 1e6, 2) == MILLIONS[depth]


def test_stage_sizes_give_the_er_weights() -> None:
    for layers, channels, expected in (
        ((3, 4, 6, 3), (256, 512, 1024, 2048), 25_344),
        ((3, 4, 23, 3), (256, 512, 1024, 2048), 269_056),
    ):
        assert sum(c * length * (length - 1) // 2 for c, length in zip(channels, layers, strict=True)) == expected


@pytest.mark.parametrize("depth", [18, 34])
def test_stage_one_of_the_basic_family_has_no_projection(depth: int) -> None:
    model = on_meta(depth)
    assert model.layer1[0].downsample is None
    assert isinstance(model.layer2[0].downsample, nn.Sequential)


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = er_resnet18(10)
    weight = model.layer3[0].conv1.weight  # fan_out = 256 * 9
    expected = (2 / (256 * 9)) ** 0.5
    # the sample deviation of n values scatters by 1 / sqrt(2 n) of itself; six times that
    assert abs(float(weight.detach().std()) / expected - 1) < 6 / (2 * weight.numel()) ** 0.5
    for name, parameter in model.named_parameters():
        if ".bn" in name or "downsample.1" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
        if ".shortcut." in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("block", ["standard", "er133"])
@pytest.mark.parametrize("family", ["basic", "bottleneck"])
def test_forward_shapes(family: str, block: str, norm: str) -> None:
    model = small(family, block=block, norm=norm, num_groups=4 if norm == "group" else None, in_channels=2)
    x = torch.randn(2, 2, 65, 96)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 3, 3)
    assert model(x).shape == (2, 5)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    info = model.feature_info
    assert [level["reduction"] for level in info] == [2, 4, 8, 16, 32]
    assert [level["num_chs"] for level in info][1:] == [stage.channels for stage in model.stages]
    assert all(hasattr(model, level["module"]) for level in info)


def test_group_norm_defaults_to_32_groups() -> None:
    model = on_meta(18, norm="group")
    assert model.layer1[1].shortcut.num_groups == 32
    assert "layer1.1.shortcut.running_mean" not in model.state_dict()


def test_classifier() -> None:
    model = small().double()
    assert isinstance(model.get_classifier(), nn.Linear)
    model.reset_classifier(3)
    assert model.get_classifier().weight.dtype == torch.float64
    assert model.num_classes == 3
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).shape == (2, 64)


@pytest.mark.parametrize("global_pool", ["avg", "max", "avgmax", "catavgmax"])
def test_global_pooling(global_pool: str) -> None:
    model = small(global_pool=global_pool).double()
    x = torch.randn(2, 64, 3, 4, dtype=torch.float64)
    average, maximum = x.mean((2, 3)), x.amax((2, 3))
    expected = {"avg": average, "max": maximum, "avgmax": (average + maximum) / 2}
    expected["catavgmax"] = torch.cat((average, maximum), 1)
    pooled = model.forward_head(x, pre_logits=True)
    torch.testing.assert_close(pooled, expected[global_pool], rtol=1e-14, atol=1e-14)
    assert model.head_hidden_size == pooled.shape[1]
    torch.testing.assert_close(model.forward_head(x), nn.functional.linear(pooled, model.fc.weight, model.fc.bias))


def test_reset_classifier_keeps_or_replaces_the_pooling() -> None:
    model = small(num_classes=0, global_pool="catavgmax").double().eval()
    x = torch.randn(2, 64, 3, 3, dtype=torch.float64)
    model.reset_classifier(7)
    assert model.forward_head(x).shape == (2, 7) and model.fc.in_features == 128
    model.reset_classifier(0, "")
    assert torch.equal(model.forward_head(x), x) and not model.avgpool.training
    model.reset_classifier(3)
    torch.testing.assert_close(model.forward_head(x, pre_logits=True), x.mean((2, 3)))
    for global_pool, message in (("", "leaves no pooled features for num_classes=3"), ("mean", "must be one of")):
        with pytest.raises(ValueError, match=message):
            model.reset_classifier(3, global_pool)
    assert model(torch.randn(1, 3, 33, 33, dtype=torch.float64)).shape == (1, 3)


@pytest.mark.parametrize(
    ("indices", "levels"), [(None, [0, 1, 2, 3, 4]), (2, [3, 4]), ([1, 3], [1, 3]), ((-1, 0), [0, 4]), ([2], [2])]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_intermediates(indices: object, levels: list[int], checkpointing: bool) -> None:
    """Each level is what hooks on the modules of `feature_info` see."""
    model = small().eval()
    model.set_grad_checkpointing(checkpointing)
    seen: dict[str, torch.Tensor] = {}
    x = torch.randn(2, 3, 64, 64)
    final, maps = model.forward_intermediates(x, indices)
    assert torch.equal(final, model.forward_features(x))
    for level in model.feature_info:
        model.get_submodule(level["module"]).register_forward_hook(
            lambda _, __, y, name=level["module"]: seen.update({name: y})
        )
    model(x)
    assert len(maps) == len(levels)
    for found, level in zip(maps, levels, strict=True):
        info = model.feature_info[level]
        torch.testing.assert_close(found, seen[info["module"]], rtol=1e-5, atol=1e-5)
        assert found.shape[1:] == (info["num_chs"], 64 // info["reduction"], 64 // info["reduction"])
    assert all(torch.equal(a, b) for a, b in zip(
        model.forward_intermediates(x, indices, intermediates_only=True, stop_early=True), maps, strict=True
    ))  # fmt: skip


@pytest.mark.parametrize("indices", [0, 6, [5], [-6], []])
def test_levels_out_of_range(indices: object) -> None:
    model = small()
    for call in (lambda: model.forward_intermediates(torch.zeros(1, 3, 32, 32), indices),
                 lambda: model.prune_intermediate_layers(indices)):  # fmt: skip
        with pytest.raises(ValueError, match="indices"):
            call()
    assert len(model.stages) == 4
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NHWC'"):
        model.forward_intermediates(torch.zeros(1, 3, 32, 32), output_fmt="NHWC")


@pytest.mark.parametrize("last", range(5))
def test_pruning(last: int) -> None:
    """What is left ends with the last level selected, trains completely, and takes a new classifier."""
    model = small().double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = model.forward_intermediates(x, [last], intermediates_only=True)[0]
    channels = model.feature_info[last]["num_chs"]
    assert model.prune_intermediate_layers([last]) == [last]
    assert torch.equal(model(x), expected) and torch.equal(model.forward_features(x), expected)
    assert len(model.feature_info) == last + 1
    assert (model.num_features, model.head_hidden_size, model.num_classes) == (channels, channels, 0)
    model.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.reset_classifier(3)
    model.set_fused(False)
    assert model(x).shape == (2, 3)


def test_pruning_without_the_head() -> None:
    model = small().eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    assert model.prune_intermediate_layers(2, prune_head=False) == [3, 4]
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("coarse", [False, True])
def test_parameter_groups(coarse: bool) -> None:
    model = small()
    matchers = {group: re.compile(pattern) for group, pattern in model.group_matcher(coarse).items()}
    found = {}
    for name, _ in model.named_parameters():
        matches = {group: match for group, matcher in matchers.items() if (match := matcher.match(name))}
        assert len(matches) == (not name.startswith("fc.")), name
        for group, match in matches.items():
            found.setdefault((group, *match.groups()), []).append(name)
    assert found[("stem",)] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert len(found) == 1 + (4 if coarse else 8)
    assert model.no_weight_decay() == {name for name, _ in model.named_parameters() if "shortcut" in name}
    assert len(model.no_weight_decay()) == 4


def test_other_names_of_sizes() -> None:
    model = small(in_channels=2)
    assert (model.in_chans, model.inplanes) == (2, 64)


def test_device_and_dtype() -> None:
    model = er_resnet50(3, device="meta", dtype=torch.bfloat16)
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert {t.dtype for t in model.parameters()} == {torch.bfloat16}


def test_dropout_acts_in_training_only() -> None:
    model = small(drop_rate=0.5)
    features = torch.rand(2, model.num_features, 1, 1)
    torch.manual_seed(0)
    assert not torch.equal(model.forward_head(features), model.forward_head(features))
    model.eval()
    assert torch.equal(model.forward_head(features), model.forward_head(features))


def test_dilation_in_place_of_strides() -> None:
    model = small("bottleneck", replace_stride_with_dilation=(False, True, True))
    assert model.forward_features(torch.randn(2, 3, 64, 64)).shape[2:] == (8, 8)
    assert [level["reduction"] for level in model.feature_info] == [2, 4, 8, 8, 8]
    # torchvision: the first block of a dilated stage keeps the dilation of the stage before
    assert [model.layer3[0].conv2.dilation[0], model.layer4[0].conv2.dilation[0]] == [1, 2]
    assert model.layer4[1].conv2.dilation == (4, 4)


def test_channels_last_stays_channels_last() -> None:
    model = small().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    features = model.forward_features(x)
    assert features.is_contiguous(memory_format=torch.channels_last)
    features.sum().backward()


@pytest.mark.parametrize("fused", [True, False])
def test_copies_and_pickles_compute_the_same(fused: bool) -> None:
    model = small("bottleneck", fused=fused)
    x = torch.randn(2, 3, 40, 40)
    model(x).sum().backward()
    model.eval()
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = small("bottleneck", fused=not fused).eval()
    missing = other.load_state_dict(torch.load(file, weights_only=True))
    assert not missing.missing_keys and not missing.unexpected_keys
    # the two paths round differently: about a hundred float32 operations deep
    torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("fused", [True, False])
def test_checkpointing_changes_nothing_but_memory(fused: bool, norm: str) -> None:
    """Also with the stem frozen (stage 1's input needs no gradient), and when a retained graph runs backward twice."""
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    models = []
    for checkpointing in (False, True):
        model = small(fused=fused, norm=norm, num_groups=2 if norm == "group" else None).double()
        model.conv1.requires_grad_(False)
        model.bn1.requires_grad_(False)
        model.set_grad_checkpointing(checkpointing)
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        models.append(model)
    plain, checkpointed = models
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    for (name, b), c in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(b, c), name
        assert "num_batches" not in name or int(b) == 1, name


def test_checkpointing_keeps_only_the_inputs_of_stages() -> None:
    def saved_bytes(model: ERResNet) -> int:
        seen: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.randn(4, 3, 64, 64))
        return sum(seen.values())

    model = small()
    plain = saved_bytes(model)
    model.set_grad_checkpointing()
    assert saved_bytes(model) < 0.5 * plain


def test_wrapped_stages_are_not_skipped() -> None:
    model = small().eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    model.layer1, model.layer2 = nn.Sequential(model.layer1), nn.Sequential(model.layer2)
    assert torch.equal(model(x), expected)
    model.set_fused(False)
    assert model.layer2[0].fused is False


@pytest.mark.parametrize(
    ("kw", "error", "message"),
    [
        ({"num_classes": -1}, ValueError, "num_classes must be at least 0, got -1"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an int, got 2.0"),
        ({"in_channels": 0}, ValueError, "in_channels must be at least 1"),
        ({"base_channels": True}, TypeError, "base_channels must be an int"),
        ({"family": "wide"}, ValueError, "family must be one of"),
        ({"block": "bottleneck"}, ValueError, "block must be one of"),
        ({"norm": "layer"}, ValueError, "norm must be one of"),
        ({"norm": "group", "num_groups": 3}, ValueError, "num_groups must divide the 8 channels of stage 1, got 3"),
        ({"norm": "batch", "num_groups": 4}, ValueError, "num_groups=4 has no meaning with norm='batch'"),
        ({"layers": (2, 2)}, ValueError, "layers must have 4 entries"),
        ({"layers": (2, 2, 0, 1)}, ValueError, r"layers\[2\] must be at least 1"),
        ({"width_per_group": 128}, ValueError, "width_per_group must be 64 for the basic family"),
        ({"replace_stride_with_dilation": (True,)}, ValueError, "must have 3 entries"),
        ({"drop_rate": 1.0}, ValueError, r"drop_rate must be in \[0, 1\)"),
    ],
)
def test_errors(kw: dict, error: type[Exception], message: str) -> None:
    arguments = {"family": "basic", "layers": (2, 1, 1, 1)} | SMALL | kw
    with pytest.raises(error, match=message):
        ERResNet(arguments.pop("family"), arguments.pop("layers"), **arguments)


def test_stage_errors() -> None:
    with pytest.raises(ValueError, match="num_blocks must be at least 1, got 0"):
        ERStage(3, 8, 0)
    with pytest.raises(ValueError, match="block must be one of"):
        ERStage(3, 8, 2, block="standard")


def test_unknown_keyword_is_an_error() -> None:
    with pytest.raises(
        TypeError, match="er_resnet50 has no argument zero_init_residual; its arguments are num_classes, "
    ):
        er_resnet50(zero_init_residual=True)


def test_stage_behaves_like_a_sequence() -> None:
    stage = ERStage(3, 8, 3)
    assert len(stage) == 3
    assert [type(block).__name__ for block in stage] == ["ProjectionBottleneck", "ERBottleneck", "ERBottleneck"]
    assert stage[-1] is stage.get_submodule("2")


@pytest.mark.parametrize(("x", "error", "message"), [
    (torch.zeros(2, 1, 32, 32), ValueError, r"x has shape \(2, 1, 32, 32\); expected \[N, 3, H, W\]"),
    (torch.zeros(3, 32, 32), ValueError, r"x has shape \(3, 32, 32\)"),
    (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, "x is torch.uint8; expected a floating tensor"),
    (torch.zeros(2, 3, 32, 32).double(), TypeError, "x is torch.float64 and the weights are torch.float32"),
    (None, TypeError, "x is NoneType"),
])  # fmt: skip
def test_images_that_do_not_fit_are_named(x, error, message):
    network = ERResNet("basic", (1, 1, 1, 1), 3, base_channels=16)
    for call in (network, network.forward_intermediates):
        with pytest.raises(error, match=message):
            call(x)
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.zeros(2, 3, 32, 32).bfloat16())


def test_a_stage_without_a_stride_is_refused():
    with pytest.raises(ValueError, match="stride must be an int of at least 1, got 0"):
        ERStage(4, 8, 2, stride=0)


@pytest.mark.parametrize("family", ["basic", "bottleneck"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_stochastic_depth(family: str, checkpointing: bool) -> None:
    """Rates grow from block to block; fused, composed and recomputed passes draw the same; evaluation draws nothing."""
    torch.manual_seed(0)
    model = ERResNet(family, (1, 3, 2, 1), 3, base_channels=8, drop_path_rate=0.6).double()
    blocks = [block for stage in model.stages for block in stage]
    rates = [block.drop_path.rate if "drop_path" in block._modules else 0.0 for block in blocks]
    assert rates == pytest.approx([0.6 * k / 6 for k in range(7)])
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    state, found = copy.deepcopy(model.state_dict()), []
    for fused in (True, False):
        model.load_state_dict(state)
        model.set_fused(fused)
        model.set_grad_checkpointing(checkpointing and fused)
        model.zero_grad()
        torch.manual_seed(7)
        y = model.train()(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in model.parameters()), *model.state_dict().values()])
        other = model(x)
        assert not torch.equal(other, y)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    plain = ERResNet(family, (1, 3, 2, 1), 3, base_channels=8).double().eval()
    plain.load_state_dict(model.state_dict())
    model.eval().set_fused(True)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)


def test_a_dropped_path_is_zero_and_the_others_are_scaled() -> None:
    drop, x = DropPath(0.75), torch.randn(64, 2, 3, 3)
    y = drop(x)
    kept = y.flatten(1).abs().sum(1) > 0
    assert 0 < int(kept.sum()) < 64
    torch.testing.assert_close(y[kept], 4 * x[kept])
    assert drop.eval()(x) is x and DropPath(0.0)(x) is x and "0.75" in repr(drop)
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\), got 1"):
        DropPath(1)


def test_intermediate_layers_as_vision_transformers_give_them() -> None:
    model, x = small().eval(), torch.randn(2, 3, 64, 64)
    _, maps = model.forward_intermediates(x)
    for n, levels in ((1, [4]), (3, [2, 3, 4]), ([0, 2], [0, 2])):
        found = model.get_intermediate_layers(x, n, reshape=True, norm=True)
        assert all(torch.equal(a, maps[level]) for a, level in zip(found, levels, strict=True))
    assert model.get_classifier(name_only=True) == "fc"
