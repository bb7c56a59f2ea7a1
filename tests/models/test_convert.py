from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from plain_networks import PlainBlock, PlainResNet
from torch import nn

from ernet_fast import convert_resnet, er_resnet18, fold_for_inference
from ernet_fast.models import ERResNet, load_torchvision_state_dict

Plain = Callable[..., nn.Module]


def plain_keys(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t for name, t in model.state_dict().items() if ".shortcut." not in name}


def train_a_little(model: nn.Module) -> None:
    for _ in range(2):
        model(torch.randn(2, model.conv1.in_channels, 32, 32)).sum().backward()


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(("bottleneck", "widening"), [(False, 1), (True, 1), (True, 2)])
def test_every_tensor_is_kept_and_the_original_untouched(
    plain_resnet: Plain, bottleneck: bool, widening: int, norm: str
) -> None:
    torch.manual_seed(0)
    model = plain_resnet((2, 3, 1, 2), bottleneck=bottleneck, widening=widening, in_channels=4, num_classes=7)
    train_a_little(model)
    before = copy.deepcopy(model.state_dict())
    er = convert_resnet(model, norm=norm, num_groups=2 if norm == "group" else None)
    assert isinstance(er, ERResNet)
    assert (er.num_classes, er.in_channels, er.num_features) == (7, 4, 64 * (4 if bottleneck else 1))
    kept = plain_keys(er)
    assert kept.keys() == before.keys()
    assert all(torch.equal(kept[name], before[name]) for name in before)
    er.train()
    train_a_little(er)
    with torch.no_grad():
        for parameter in er.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_same_function_as_loading_the_state_dict(plain_resnet: Plain) -> None:
    torch.manual_seed(0)
    model = plain_resnet((2, 3, 1, 2), bottleneck=True).double()
    converted = convert_resnet(model)
    loaded = ERResNet("bottleneck", (2, 3, 1, 2), 5, base_channels=8).double()
    load_torchvision_state_dict(loaded, model.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert torch.equal(converted(x), loaded(x))
    assert converted.feature_info == loaded.feature_info


def test_without_shortcuts_the_function_is_kept(plain_resnet: Plain) -> None:
    model = plain_resnet((1, 1, 1, 1)).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(convert_resnet(model)(x), model(x), rtol=1e-12, atol=1e-12)


def test_device_dtype_mode_and_frozen_parameters(plain_resnet: Plain) -> None:
    model = plain_resnet().to(torch.bfloat16).train()
    model.layer1.requires_grad_(False)
    model.layer1[1].bn2.eval()
    er = convert_resnet(model)
    assert {t.dtype for t in er.state_dict().values() if t.is_floating_point()} == {torch.bfloat16}
    assert er.training and er.layer1[1].shortcut.training and er.layer2[0].relu.training
    assert not er.layer1[1].bn2.training
    assert not er.layer1[1].conv1.weight.requires_grad
    assert er.layer1[1].shortcut.weight.requires_grad
    assert not any(module.training for module in convert_resnet(model.eval()).modules())
    with torch.device("meta"):
        placed = convert_resnet(plain_resnet())
    assert {t.device.type for t in placed.state_dict().values()} == {"meta"}


def test_random_numbers_are_not_drawn(plain_resnet: Plain) -> None:
    model = plain_resnet()
    before = torch.get_rng_state()
    convert_resnet(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_timm_like_network(plain_resnet: Plain) -> None:
    """timm names its activations act1 ..., pools in `global_pool` and has identities and Nones between."""
    model = plain_resnet((2, 2, 1, 1), bottleneck=True)

    class Pool(nn.Module):
        pool_type = "avg"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3), keepdim=True)

    model.act1, model.global_pool, model.drop_rate = model.relu, Pool(), 0.25
    del model.relu, model.avgpool
    model.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in layer:
            block.act1, block.act2, block.act3 = nn.ReLU(True), nn.ReLU(True), nn.ReLU(True)
            block.aa, block.drop_block, block.se, block.drop_path = nn.Identity(), nn.Identity(), None, None
            del block.relu
    er = convert_resnet(model)
    assert (er.in_channels, er.drop_rate) == (3, 0.25)
    assert not {"aa", "se", "drop_path"} & {name for block in er.layer1 for name, _ in block.named_children()}
    assert plain_keys(er).keys() == model.state_dict().keys()
    assert [level["reduction"] for level in er.feature_info] == [2, 4, 8, 16, 32]
    assert er(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    er.reset_classifier(2)
    assert er(torch.randn(2, 3, 64, 64)).shape == (2, 2)


def test_small_image_stem_and_dilation_are_kept(plain_resnet: Plain) -> None:
    model = plain_resnet((2, 2, 2, 1))
    model.conv1 = nn.Conv2d(1, 8, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    conv = model.layer3[1].conv1
    conv.dilation, conv.padding = (2, 2), (2, 2)
    er = convert_resnet(model)
    assert [level["reduction"] for level in er.feature_info] == [1, 1, 2, 4, 8]
    assert er.layer3[1].conv1.dilation == (2, 2)
    assert er.forward_features(torch.randn(2, 1, 32, 32)).shape[2:] == (4, 4)


@pytest.mark.parametrize(
    ("fc", "num_classes"),
    [(nn.Identity(), 0), (nn.Sequential(nn.Dropout(0.1), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3)), 3)],
)
def test_other_heads(plain_resnet: Plain, fc: nn.Module, num_classes: int) -> None:
    model = plain_resnet()
    model.fc = fc
    er = convert_resnet(model)
    assert er.num_classes == num_classes
    assert er(torch.randn(2, 3, 32, 32)).shape == (2, num_classes or 64)


def edited(plain_resnet: Plain, edit: Callable[[nn.Module], None], **kw: object) -> nn.Module:
    model = plain_resnet(**kw)
    edit(model)
    return model


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: delattr(m, "layer3"), r"model \(PlainResNet\) has no layer3"),
        (lambda m: setattr(m.layer2[1], "se", nn.Linear(1, 1)),
         r"layer2\.1\.se is a Linear: only plain ResNets.*SEModule, SqueezeExcitation are converted"),
        (lambda m: setattr(m.layer2[1], "aa", nn.AvgPool2d(2)), r"layer2\.1\.aa is a AvgPool2d: .* in block 0"),
        (lambda m: setattr(m.layer2[1], "drop_path", nn.Dropout(0.1)),
         r"layer2\.1\.drop_path is a Dropout: only plain ResNets"),
        (lambda m: setattr(m.layer2[1], "drop_block", nn.Dropout(0.1)),
         r"layer2\.1\.drop_block is a Dropout: .*set its rate to 0"),
        (lambda m: setattr(m, "act1", nn.GELU()), "act1 is a GELU"),
        (lambda m: setattr(m.layer1[0], "relu", nn.SiLU()), r"layer1\.0\.relu is a SiLU"),
        (lambda m: setattr(m.layer1[0], "bn1", nn.GroupNorm(1, 8)), r"layer1\.0\.bn1 is a GroupNorm, expected a Batch"),
        (lambda m: setattr(m.layer1[1], "bn2", nn.SyncBatchNorm(8)), "convert before convert_sync_batchnorm"),
        (lambda m: setattr(m.layer1[1], "bn2", nn.BatchNorm2d(8, affine=False)), r"layer1\.1\.bn2 must be affine"),
        (lambda m: delattr(m.layer1[1], "bn2"), r"lacks \['bn2'\]"),
        (lambda m: setattr(m.layer1[1], "conv2", nn.Conv2d(8, 8, 5, 1, 2)), r"layer1\.1 .*sizes \(3, 5\)"),
        (lambda m: setattr(m.layer1[1], "conv2", nn.Conv2d(8, 8, 3)), r"layer1\.1\.conv2 .* changes the size"),
        (lambda m: setattr(m.layer1[1], "conv2", nn.Linear(8, 8)), r"layer1\.1\.conv2 is a Linear, expected a Conv2d"),
        (lambda m: setattr(m.layer2[0], "downsample", None), r"layer2\.0 changes the shape of the map and has no"),
        (lambda m: setattr(m.layer2[1], "downsample", nn.Sequential()), r"layer2\.1\.downsample is a Sequential"),
        (lambda m: setattr(m, "avgpool", nn.AdaptiveMaxPool2d(1)), "avgpool must average each map to one value"),
        (lambda m: setattr(m, "conv1", nn.Identity()), "conv1 must be a Conv2d"),
        (lambda m: setattr(m, "fc", nn.Linear(3, 2)), "fc must be a linear layer .* on 64 features"),
        (lambda m: setattr(m, "layer4", nn.Sequential()), "layer4 has no blocks"),
        (lambda m: setattr(m, "bn1", nn.BatchNorm2d(4)), "bn1 has 4 channels and its convolution 8 outputs"),
        (lambda m: setattr(m.layer2[0], "bn1", nn.BatchNorm2d(8)),
         r"layer2\.0\.bn1 has 8 channels and its convolution 16 outputs: .* not before it \(pre-activation\)"),
        (lambda m: setattr(m.layer1[0], "gain", nn.Parameter(torch.ones(1))), r"layer1\.0 has tensors .* \(gain\)"),
        (lambda m: m.register_buffer("mean", torch.zeros(3)), r"PlainResNet has tensors of its own \(mean\)"),
    ],
)  # fmt: skip
def test_what_is_no_plain_resnet(plain_resnet: Plain, edit: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_resnet(edited(plain_resnet, edit))


class SEModule(nn.Module):
    """Channel attention under timm's name."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()


class ExtendedBlock(PlainBlock):
    """A block of timm's: `aa` behind the first 3x3 convolution, `se` behind the last BatchNorm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        if hasattr(self, "conv3"):
            out = self.bn3(self.conv3(self.aa(torch.relu(self.bn2(self.conv2(out))))))
        else:
            out = self.bn2(self.conv2(self.aa(out)))
        return torch.relu(self.se(out) + (x if self.downsample is None else self.downsample(x)))


def extended(plain_resnet: Plain, **kw: object) -> nn.Module:
    """A network with attention in every block, and average pooling in place of strides 2."""
    torch.manual_seed(0)
    model = plain_resnet(**kw)
    for block in (module for module in model.modules() if isinstance(module, PlainBlock)):
        spatial = block.conv2 if hasattr(block, "conv3") else block.conv1
        block.aa = nn.AvgPool2d(2) if spatial.stride == (2, 2) else nn.Identity()
        spatial.stride = (1, 1)
        block.se = SEModule((block.bn3 if hasattr(block, "conv3") else block.bn2).num_features)
        block.__class__ = ExtendedBlock
    return model


@pytest.mark.parametrize(
    "kw", [{"bottleneck": True, "groups": 4}, {"bottleneck": True, "groups": 4, "widening": 2}]
)  # fmt: skip
def test_grouped_convolutions_are_those_of_the_constructor(plain_resnet: Plain, kw: dict) -> None:
    model = plain_resnet((2, 3, 1, 2), **kw).double()
    arguments = {"groups": 4, "width_per_group": 16 * kw.get("widening", 1)}
    loaded = ERResNet("bottleneck", (2, 3, 1, 2), 5, base_channels=8, **arguments).double()
    load_torchvision_state_dict(loaded, model.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert torch.equal(convert_resnet(model)(x), loaded(x))


@pytest.mark.parametrize("kw", [{}, {"bottleneck": True, "groups": 2}])
@pytest.mark.parametrize("training", [False, True])
def test_attention_and_anti_aliasing(plain_resnet: Plain, kw: dict, training: bool) -> None:
    """They stay where they were: fused and composed networks agree, and fold; one block a stage keeps the function."""
    short = extended(plain_resnet, layers=(1, 1, 1, 1), **kw).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(convert_resnet(short)(x), short(x), rtol=1e-12, atol=1e-12)
    model = extended(plain_resnet, layers=(2, 3, 1, 2), **kw).double().train(training)
    er = convert_resnet(model)
    assert plain_keys(er).keys() == model.state_dict().keys()
    assert [level["reduction"] for level in er.feature_info] == [2, 4, 8, 16, 32]
    composed, gradients = copy.deepcopy(er), []
    composed.set_fused(False)
    for network in (er, composed):
        network(x).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    torch.testing.assert_close(composed(x), er(x), rtol=1e-10, atol=1e-10)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-8, atol=1e-9, msg=name)
    folded = fold_for_inference(er.eval())
    torch.testing.assert_close(folded(x), er(x), rtol=1e-10, atol=1e-10)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


def test_stages_that_do_not_double(plain_resnet: Plain) -> None:
    model, wider = plain_resnet((1, 1, 1, 1)), plain_resnet((1, 1, 1, 1), base_channels=16)
    model.layer4 = wider.layer4
    with pytest.raises(ValueError, match=r"double in channels, these have \[8, 16, 32, 128\]"):
        convert_resnet(model)


def test_mixed_kinds(plain_resnet: Plain) -> None:
    model, other = plain_resnet(), plain_resnet(bottleneck=True)
    model.layer4 = other.layer4
    with pytest.raises(ValueError, match="differ in kind"):
        convert_resnet(model)


def test_wrong_types(plain_resnet: Plain) -> None:
    with pytest.raises(TypeError, match="model is an ER-ResNet already"):
        convert_resnet(er_resnet18(2, base_channels=4))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got OrderedDict"):
        convert_resnet(OrderedDict())
    with pytest.raises(ValueError, match=r"Of a wrapped model pass the network itself, e\.g\. model\.module"):
        convert_resnet(nn.DataParallel(plain_resnet()))


def hook(*_: object) -> None:
    """Changes nothing, as hooks that record do."""


@pytest.mark.parametrize("name", ["", "layer2", "layer2.1", "layer2.1.relu", "avgpool", "relu"])
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_that_would_be_lost(plain_resnet: Plain, name: str, register: str) -> None:
    model = plain_resnet()
    getattr(model.get_submodule(name), register)(hook)
    with pytest.raises(
        ValueError, match=f"{re.escape(name) or 'PlainResNet'} has hooks, which the result would not have"
    ):
        convert_resnet(model)


def test_hooks_of_copied_modules_are_kept(plain_resnet: Plain) -> None:
    model, seen = plain_resnet(), []
    for name in ("conv1", "layer2.0.downsample", "layer3.0.bn1", "fc"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    er = convert_resnet(model)
    seen.clear()
    er(torch.randn(2, 3, 32, 32))
    assert sorted(seen) == ["conv1", "fc", "layer2.0.downsample", "layer3.0.bn1"]


class Doubled(PlainResNet):
    """A forward method of its own: twice the last feature map."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(2 * self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


class TwoOutputs(PlainResNet):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(x), x


class LargeImages(PlainResNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[2] < 512:
            raise RuntimeError("at least 512 pixels")
        return super().forward(x)


class PreActivation(PlainBlock):
    """BatchNorm and ReLU before each convolution; where no channels change, the modules look like a plain block's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(torch.relu(self.bn2(self.conv1(torch.relu(self.bn1(x))))))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Doubled, r"\(Doubled\) computes something else .* by Doubled\.forward"),
        (TwoOutputs, r"\(TwoOutputs\) returns tuple for one image; a plain ResNet, \[1, 5\]"),
        (LargeImages, r"\(LargeImages\) does not run on an image of 64x64.*RuntimeError: at least 512 pixels"),
        (lambda: edited(PlainResNet, lambda m: m.layer1.append(PreActivation(8, 8, 8, 1))), "computes something else"),
        (lambda: edited(PlainResNet, lambda m: m.layer1.append(PreActivation(8, 8, 8, 1)), bottleneck=False).bfloat16(),
         "computes something else"),
    ],
)  # fmt: skip
def test_another_computation(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_resnet(build())


def test_scripted_and_compiled_networks(plain_resnet: Plain) -> None:
    model = plain_resnet()
    with pytest.raises(ValueError, match=r"TorchScript module \(PlainResNet\): convert the network that was"):
        convert_resnet(torch.jit.trace(model.eval(), torch.randn(1, 3, 64, 64)))
    with pytest.raises(ValueError, match=r"compiled by torch\.compile: convert model\._orig_mod"):
        convert_resnet(torch.compile(model))
    model.compile()
    assert convert_resnet(model).num_classes == 5


def test_networks_without_finite_outputs_convert(plain_resnet: Plain) -> None:
    """Half precision overflows in an untrained network, and a diverged network holds NaN."""
    model = plain_resnet()
    nn.init.constant_(model.layer1[0].conv1.weight, 1e30)
    convert_resnet(model)
    nn.init.constant_(model.fc.bias, float("nan"))
    convert_resnet(model.half())


def test_torchvision_and_timm_are_not_imported() -> None:
    program = (
        "import sys, ernet_fast; ernet_fast.convert_resnet; sys.exit(bool({'torchvision', 'timm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0
