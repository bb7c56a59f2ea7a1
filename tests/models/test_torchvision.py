"""ER-ResNets where torchvision's ResNets are used: feature extraction, detection, quantisation-free export."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ernet_fast import convert_resnet, er_resnet18, er_resnet50, er_resnet101
from ernet_fast.models import ERResNet, load_torchvision_state_dict
from ernet_fast.reference.rival_networks import DenseNet121, PlainResNet

try:
    import torchvision
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
    pytest.skip(f"needs a torchvision that loads: {error}", allow_module_level=True)

SMALL = {"num_classes": 3, "base_channels": 8}


def small(*, fused: bool = True, norm: str = "batch") -> ERResNet:
    torch.manual_seed(0)
    model = er_resnet18(**SMALL, fused=fused, norm=norm, num_groups=4 if norm == "group" else None)
    model(torch.randn(4, 3, 64, 64))  # running statistics of something
    return model


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("fused", [True, False])
def test_feature_extractor(fused: bool, norm: str) -> None:
    """Nodes of the graph have the values that the network computes, in training and in evaluation."""
    from torchvision.models.feature_extraction import create_feature_extractor

    model = small(fused=fused, norm=norm).double()
    nodes = {"relu": "stem", "layer1": "quarter", "layer3": "sixteenth", "layer4": "last", "fc": "logits"}
    extractor = create_feature_extractor(model, nodes)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for network, traced in ((model.train(), extractor.train()), (model.eval(), extractor.eval())):
        last, levels = network.forward_intermediates(x)
        found = traced(x)
        assert list(found) == list(nodes.values())
        expected = {"stem": levels[0], "quarter": levels[1], "sixteenth": levels[3], "last": last}
        for name, level in expected.items():
            torch.testing.assert_close(found[name], level, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found["logits"], network.forward_head(last), rtol=1e-9, atol=1e-9)


def test_feature_extractor_of_every_part() -> None:
    """Grouped convolutions, attention and stochastic depth are traced too."""
    from torchvision.models.feature_extraction import create_feature_extractor

    torch.manual_seed(0)
    model = ERResNet("bottleneck", (1, 3, 1, 1), 3, base_channels=8, groups=2, width_per_group=32, drop_path_rate=0.3)
    for block in model.layer2:
        block.add_module("se", torchvision.ops.SqueezeExcitation(64, 8))
    x = torch.randn(4, 3, 64, 64)
    model(x)
    extractor = create_feature_extractor(model, {"layer2": "second", "layer2.1.se": "attended", "fc": "logits"})
    found = extractor.eval()(x)
    torch.testing.assert_close(found["second"], model.eval().forward_intermediates(x)[1][2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["logits"], model(x), rtol=1e-4, atol=1e-5)
    assert found["attended"].shape == (4, 64, 8, 8)
    first, second = (extractor.train()(x)["logits"] for _ in range(2))
    assert not torch.equal(first, second)


def test_gradients_of_a_feature_extractor() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    model = small().double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    create_feature_extractor(model, ["fc"])(x)["fc"].square().sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("trainable_layers", [0, 3, 5])
def test_feature_pyramid(trainable_layers: int) -> None:
    """torchvision's extractor for detection reads `inplanes` and the children in order."""
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

    model = small().eval()
    pyramid = _resnet_fpn_extractor(model, trainable_layers).eval()
    x = torch.randn(1, 3, 128, 96)
    maps = pyramid.body(x)
    torch.testing.assert_close(maps["3"], model.forward_features(x), rtol=1e-4, atol=1e-4)
    found = pyramid(x)
    assert [tuple(y.shape[1:]) for y in found.values()] == [
        (256, 32, 24), (256, 16, 12), (256, 8, 6), (256, 4, 3), (256, 2, 2)
    ]  # fmt: skip
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad} - {"fc"}
    assert frozen == {0: {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}, 3: {"conv1", "bn1", "layer1"}}.get(
        trainable_layers, set()
    )


def test_segmentation_backbone() -> None:
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation import FCN
    from torchvision.models.segmentation.fcn import FCNHead

    backbone = er_resnet50(base_channels=8, replace_stride_with_dilation=(False, True, True))
    model = FCN(IntermediateLayerGetter(backbone, {"layer4": "out"}), FCNHead(backbone.inplanes, 4)).eval()
    assert model(torch.randn(1, 3, 64, 64))["out"].shape == (1, 4, 64, 64)


@pytest.mark.parametrize("dilated", [(False, True, True), (False, False, True)])
def test_dilated_backbones(dilated: tuple[bool, bool, bool]) -> None:
    """Those that its segmentation networks use: each convolution has the stride and dilation of its own."""
    from torchvision.models._utils import IntermediateLayerGetter

    plain = torchvision.models.resnet50(num_classes=3, replace_stride_with_dilation=list(dilated)).eval()
    built, converted = er_resnet50(3, replace_stride_with_dilation=dilated), convert_resnet(plain)
    for name, conv in plain.named_modules():
        if isinstance(conv, torch.nn.Conv2d):
            for model in (built, converted):
                assert str(model.get_submodule(name)) == str(conv), name
    layers = {"layer2": "low", "layer3": "aux", "layer4": "out"}
    sizes = [
        {name: tuple(y.shape) for name, y in IntermediateLayerGetter(model, layers)(torch.randn(1, 3, 64, 64)).items()}
        for model in (plain, converted)
    ]
    assert sizes[0] == sizes[1] and sizes[0]["out"][2] == (8 if dilated[1] else 4)
    assert [level["reduction"] for level in converted.feature_info][-1] == (8 if dilated[1] else 16)


def test_deeplab_with_an_auxiliary_head() -> None:
    """Its segmentation networks read two layers by name (`return_layers`), of a dilated backbone."""
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation import DeepLabV3
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead
    from torchvision.models.segmentation.fcn import FCNHead

    torch.manual_seed(0)
    backbone = er_resnet50(base_channels=8, replace_stride_with_dilation=(False, True, True))
    widths = {level["module"]: level["num_chs"] for level in backbone.feature_info}
    layers = IntermediateLayerGetter(backbone, return_layers={"layer4": "out", "layer3": "aux"})
    model = DeepLabV3(layers, DeepLabHead(widths["layer4"], 4, (3, 6, 9)), FCNHead(widths["layer3"], 4))
    found = model.train()(torch.randn(2, 3, 64, 64))
    assert {name: tuple(y.shape) for name, y in found.items()} == {"out": (2, 4, 64, 64), "aux": (2, 4, 64, 64)}
    (found["out"].sum() + found["aux"].sum()).backward()
    assert all(p.grad is not None for name, p in backbone.named_parameters() if not name.startswith("fc."))


def test_detection_network() -> None:
    """RetinaNet on a feature pyramid of an ER-ResNet: losses in training, boxes in evaluation."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

    backbone = _resnet_fpn_extractor(small(), 5, returned_layers=[2, 3, 4])
    model = RetinaNet(backbone, num_classes=2, min_size=64, max_size=64, anchor_generator=_anchors())
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 64)]
    boxes = torch.tensor([[4.0, 4.0, 40.0, 36.0]])
    losses = model.train()(images, [{"boxes": boxes, "labels": torch.tensor([1])}] * 2)
    sum(losses.values()).backward()
    assert bool(backbone.body.layer2[1].shortcut.weight.grad.isfinite().all())
    assert [sorted(found) for found in model.eval()(images)] == [["boxes", "labels", "scores"]] * 2


def _anchors() -> torch.nn.Module:
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    return AnchorGenerator(tuple((8 * 2**k,) for k in range(4)), ((0.5, 1.0, 2.0),) * 4)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "densenet121"])
def test_the_rivals_of_the_benches_are_its_networks(name: str) -> None:
    """Its weights load into them, and the outputs are the same, in training and in evaluation."""
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=3)
    ours = DenseNet121(3) if name == "densenet121" else PlainResNet(int(name.removeprefix("resnet")), 3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [18, 50])
def test_weights_and_conversion_of_torchvisions_networks(depth: int) -> None:
    """Its real state dict loads and its real network converts, to the same function."""
    torch.manual_seed(0)
    plain = getattr(torchvision.models, f"resnet{depth}")(num_classes=3).eval()
    converted = convert_resnet(plain)
    loaded = (er_resnet18 if depth == 18 else er_resnet50)(3).eval()
    load_torchvision_state_dict(loaded, plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(converted(x), loaded(x))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("build", "arguments"),
    [
        ("resnext50_32x4d", {"groups": 32, "width_per_group": 4}),
        ("resnext101_32x8d", {"groups": 32, "width_per_group": 8}),
        ("wide_resnet50_2", {"width_per_group": 128}),
    ],
)  # fmt: skip
def test_grouped_and_wide_networks(build: str, arguments: dict[str, int]) -> None:
    """Its arguments build the network that the conversion gives."""
    with torch.device("meta"):
        converted = convert_resnet(getattr(torchvision.models, build)(num_classes=3))
        built = (er_resnet101 if "101" in build else er_resnet50)(3, **arguments)
    shapes = [{name: tensor.shape for name, tensor in m.state_dict().items()} for m in (converted, built)]
    assert shapes[0] == shapes[1]
    groups = [[m.groups for m in network.modules() if isinstance(m, torch.nn.Conv2d)] for network in (converted, built)]
    assert groups[0] == groups[1]


@pytest.mark.parametrize(
    "build", ["densenet121", "mobilenet_v3_small", "vit_b_16", "shufflenet_v2_x1_0"]
)  # fmt: skip
def test_other_families_are_refused(build: str) -> None:
    with torch.device("meta"):
        model = getattr(torchvision.models, build)()
    with pytest.raises(ValueError, match=r"has no |is a "):
        convert_resnet(model)


def test_its_operators_load_after_the_stain_peers() -> None:
    """A second definition of an operator of torchvision's, by whatever comes first, aborts the process."""
    program = (
        "import torch; from ernet_fast.benchmark import macenko_peers; macenko_peers._let_torchvision_import()\n"
        "import torchvision; boxes = torch.tensor([[0., 0., 1., 1.]])\n"
        "assert torchvision.ops.nms(boxes, torch.ones(1), 0.5).tolist() == [0]"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
