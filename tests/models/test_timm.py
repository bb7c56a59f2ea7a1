"""ER-ResNets by `timm.create_model`: with timm where it can be imported, else with a stand-in of what is used of it."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ernet_fast import convert_resnet, er_resnet18, er_resnet50, logit_agreement
from ernet_fast.models import ERResNet

MODULE = "ernet_fast.models.timm_models"


def stand_in() -> types.ModuleType:
    """timm.models: a registry, and a builder that passes arguments on, with those of the configuration set."""
    models, registry = types.ModuleType("timm.models"), {}

    def register_model(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        registry[function.__name__] = function
        return function

    def build_model_with_cfg(build: Callable[..., nn.Module], name: str, pretrained: bool, **kw: Any) -> nn.Module:
        del kw["pretrained_cfg"], kw["pretrained_cfg_overlay"]
        model = build(**{"num_classes": 1000, "in_chans": 3, **kw})
        model.pretrained_cfg = sys.modules[MODULE].default_cfgs[name]
        return model

    def create_model(name: str, *, pretrained: bool = False, **kw: Any) -> nn.Module:
        return registry[name](pretrained=pretrained, pretrained_cfg=None, pretrained_cfg_overlay=None, **kw)

    models.register_model, models.build_model_with_cfg = register_model, build_model_with_cfg
    models.generate_default_cfgs, models.create_model = dict, create_model
    no_source = types.SimpleNamespace(has_weights=False, state_dict=None)
    models.resolve_pretrained_cfg = lambda *_, **__: no_source
    return models


@pytest.fixture
def create_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., nn.Module]]:
    try:
        models = importlib.import_module("timm.models")
        importlib.import_module(MODULE)  # once: timm warns of a name that is registered again
        yield models.create_model
        return
    except (ImportError, RuntimeError):  # not installed, or a torchvision beside it that does not load
        models = stand_in()
    package = types.ModuleType("timm")
    package.models = models
    monkeypatch.setitem(sys.modules, "timm", package)
    monkeypatch.setitem(sys.modules, "timm.models", models)
    sys.modules.pop(MODULE, None)
    importlib.import_module(MODULE)
    yield models.create_model
    sys.modules.pop(MODULE, None)


def test_create_model(create_model):
    model = create_model("er_resnet18", num_classes=2, in_chans=1, drop_rate=0.25, norm="group")
    assert isinstance(model, ERResNet)
    assert (model.num_classes, model.in_channels, model.drop_rate) == (2, 1, 0.25)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 2)
    assert create_model("er_resnet50", num_classes=5).state_dict().keys() == er_resnet50(5).state_dict().keys()


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_every_depth_is_registered(create_model, depth):
    with torch.device("meta"):
        assert create_model(f"er_resnet{depth}", num_classes=0).num_classes == 0


def test_weights_of_a_file(create_model, tmp_path):
    source = er_resnet18(num_classes=3)
    torch.save(source.state_dict(), tmp_path / "er.pt")
    model = create_model("er_resnet18", num_classes=3, weights=tmp_path / "er.pt")
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(x), source.eval()(x))


def test_what_is_refused(create_model):
    with pytest.raises(RuntimeError, match="no pretrained weights of er_resnet34 are published: use pretrained=False"):
        create_model("er_resnet34", pretrained=True)
    with pytest.raises(ValueError, match="global_pool must be one of .*, got 'fast'"):
        create_model("er_resnet18", global_pool="fast")
    with pytest.raises(ValueError, match="global_pool='' leaves no pooled features for num_classes=1000"):
        create_model("er_resnet18", global_pool="")
    with pytest.raises(ValueError, match=r"output_stride must be one of \[8, 16, 32\], got 4"):
        create_model("er_resnet18", output_stride=4)
    with pytest.raises(TypeError, match="er_resnet18 has no argument stem_type, act_layer; its arguments are num_"):
        create_model("er_resnet18", stem_type="deep", act_layer="gelu")
    with pytest.raises(ValueError, match="zero_init_last=True is not offered: shortcuts normalise every map"):
        create_model("er_resnet18", zero_init_last=True)
    with pytest.raises(ValueError, match=r"drop_path_rate must be in \[0, 1\), got 1.5"):
        create_model("er_resnet18", drop_path_rate=1.5)
    with pytest.raises(TypeError, match="in_channels is called in_chans in timm"):
        create_model("er_resnet18", in_channels=1)


def test_output_stride_device_and_dtype(create_model):
    model = create_model("er_resnet18", num_classes=0, output_stride=16, device="meta", dtype=torch.float64)
    assert [level["reduction"] for level in model.feature_info] == [2, 4, 8, 16, 16]
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {"meta"}
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float64}


def test_weights_of_a_plain_resnet_load_strictly(create_model, plain_resnet):
    """The shortcuts keep their weights, and a warning says so; anything else missing is an error, as timm expects."""
    plain = plain_resnet((2, 2, 2, 2)).state_dict()
    model = create_model("er_resnet18", num_classes=5, base_channels=8)
    nn.init.constant_(model.layer1[1].shortcut.weight, 3.0)
    for network in (model, copy.deepcopy(model)):
        with pytest.warns(UserWarning, match="of a plain ResNet: the ER shortcuts keep theirs"):
            network.load_state_dict(plain, strict=True)
        assert torch.equal(network.layer4[1].conv2.weight, plain["layer4.1.conv2.weight"])
        assert bool((network.layer1[1].shortcut.weight == 3.0).all())
    with pytest.raises(RuntimeError, match=r"Missing key.*layer2\.1\.conv1\.weight"):
        model.load_state_dict({key: t for key, t in plain.items() if key != "layer2.1.conv1.weight"})
    own = model.state_dict()
    del own["layer1.1.shortcut.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*layer1\.1\.shortcut\.weight"):
        model.load_state_dict(own)


@pytest.fixture
def timm() -> types.ModuleType:
    """timm itself, with the ER-ResNets registered."""
    try:
        module = importlib.import_module("timm")
        importlib.import_module(MODULE)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs timm and a torchvision that loads: {error}")
    return module


SMALL = {"num_classes": 2, "base_channels": 8}


def test_the_contract_of_its_resnets(timm):
    """What timm's own resnet18 answers, an ER-ResNet answers in the same kinds and sizes."""
    torch.manual_seed(0)
    arguments = {"num_classes": 2, "drop_path_rate": 0.2, "drop_rate": 0.1, "zero_init_last": False}
    models = [timm.create_model(name, **arguments).eval() for name in ("resnet18", "er_resnet18")]
    x = torch.randn(2, 3, 64, 64)
    answers = []
    for model in models:
        model.set_grad_checkpointing(True)
        model.train()(x).sum().backward()
        model.eval()
        levels = [{"num_chs": level["num_chs"], "reduction": level["reduction"]} for level in model.feature_info]
        answer = [levels, model.num_features, model.head_hidden_size, model.get_classifier(name_only=True)]
        answer += [model.get_classifier(), model.forward_head(model.forward_features(x), pre_logits=True)]
        answer += [*model.forward_intermediates(x, [1, -1]), model.forward_intermediates(x, 2, intermediates_only=True)]
        for num_classes, global_pool in ((5, "max"), (3, None), (0, ""), (4, "avg")):
            model.reset_classifier(num_classes, global_pool)
            answer += [model.num_classes, model.head_hidden_size, model(x)]
        answer += [sorted(model.group_matcher()), model.default_cfg["input_size"], model.prune_intermediate_layers([2])]
        answers.append([*answer, model(x)])
    assert [kind_of(answer) for answer in answers[0]] == [kind_of(answer) for answer in answers[1]]
    drops = [[b.drop_path for b in (m.layer1[1], *m.layer2)] for m in models]
    assert [drop.rate for drop in drops[1]] == pytest.approx([drop.drop_prob for drop in drops[0]])


def kind_of(answer: Any) -> Any:
    """Shapes of tensors, what modules print, and other values as they are."""
    if isinstance(answer, torch.Tensor):
        return tuple(answer.shape)
    if isinstance(answer, (list, tuple)):
        return [kind_of(part) for part in answer]
    return str(answer) if isinstance(answer, nn.Module) else answer


def test_a_folder_of_save_pretrained(timm, tmp_path):
    """timm loads it as it is, and adapts classes and channels; output_stride overrides what was saved."""
    torch.manual_seed(0)
    source = er_resnet18(3, base_channels=8, norm="group", num_groups=2, drop_path_rate=0.1).eval()
    source.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 64, 64)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(model(x), source(x)) and model.layer4[1].drop_path.rate == 0.1
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=2, in_chans=1, output_stride=16)
    assert model(x[:, :1]).shape == (2, 2) and model.feature_info[-1]["reduction"] == 16


def test_a_users_own_weights(timm, tmp_path):
    """`pretrained_cfg_overlay`, "local-dir:" and `checkpoint_path`; classes and input channels are adapted by timm."""
    source = er_resnet18(2, base_channels=8)
    nn.init.constant_(source.layer1[1].shortcut.weight, 3.0)
    torch.save(source.state_dict(), tmp_path / "pytorch_model.bin")
    overlay = {"file": str(tmp_path / "pytorch_model.bin"), "num_classes": 2}
    model = timm.create_model("er_resnet18", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
    assert all(torch.equal(t, source.state_dict()[name]) for name, t in model.state_dict().items())

    config = {"architecture": "er_resnet18", "num_classes": 2, "model_args": {"base_channels": 8}, "pretrained_cfg": {
        "num_classes": 2, "input_size": [3, 224, 224], "first_conv": "conv1", "classifier": "fc"}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=4, in_chans=1)
    assert model.fc.weight.shape == (4, 64)
    torch.testing.assert_close(model.conv1.weight, source.conv1.weight.sum(1, keepdim=True))
    assert torch.equal(model.layer1[1].shortcut.weight, source.layer1[1].shortcut.weight)

    path = str(tmp_path / "pytorch_model.bin")
    model = timm.create_model("er_resnet18", checkpoint_path=path, **SMALL)
    assert torch.equal(model.fc.weight, source.fc.weight)


def test_checkpoint_path_of_a_plain_resnet(timm, plain_resnet, tmp_path):
    plain = plain_resnet((2, 2, 2, 2), num_classes=2).state_dict()
    torch.save({"state_dict": {f"module.{name}": t for name, t in plain.items()}}, tmp_path / "resnet18.pth")
    with pytest.warns(UserWarning, match="of a plain ResNet"):
        model = timm.create_model("er_resnet18", checkpoint_path=str(tmp_path / "resnet18.pth"), **SMALL)
    assert torch.equal(model.layer3[1].conv1.weight, plain["layer3.1.conv1.weight"])


@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_optimizer_groups(timm, layer_decay):
    """ER weights never decay; with `layer_decay`, rates grow from the stem to the head, a step for each block."""
    from timm.optim import create_optimizer_v2

    model = timm.create_model("er_resnet18", **SMALL)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=layer_decay)
    groups = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert groups.keys() == set(names.values())
    for name, group in groups.items():
        decays = model.get_parameter(name).ndim > 1 and ".shortcut." not in name
        assert group["weight_decay"] == (0.05 if decays else 0.0), name
    if layer_decay is None:
        return
    blocks = ["conv1", *(f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)), "fc"]
    for name, group in groups.items():
        depth = 0 if name.startswith("bn1.") else next(k for k, b in enumerate(blocks) if name.startswith(f"{b}."))
        assert group["lr_scale"] == pytest.approx(layer_decay ** (len(blocks) - 1 - depth)), name


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx"])
def test_features(timm, feature_cls):
    """Each of timm's extractors gives the levels of the network itself."""
    torch.manual_seed(0)
    model = timm.create_model("er_resnet18", **SMALL).eval()
    torch.manual_seed(0)
    selection = {"features_only": True, "out_indices": (1, 2, 4), "feature_cls": feature_cls}
    extractor = timm.create_model("er_resnet18", **selection, **SMALL).eval()
    x = torch.randn(1, 3, 64, 64)
    levels = model.forward_intermediates(x, intermediates_only=True)
    assert extractor.feature_info.channels() == [8, 16, 64] and extractor.feature_info.reduction() == [4, 8, 32]
    features = extractor(x)
    for found, level in zip(features.values() if isinstance(features, dict) else features, (1, 2, 4), strict=True):
        torch.testing.assert_close(found, levels[level], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["resnet14t", "resnext50d_32x4d", "seresnet18", "ecaresnet26t", "resnetblur18", "resnetaa34d", "resnetrs50"]
)  # fmt: skip
def test_conversion(timm, name):
    """Deep stems, grouped convolutions, attention, blurring and average-pooled projections are taken over."""
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=3).eval()
    er = convert_resnet(plain)
    state = {key: tensor for key, tensor in er.state_dict().items() if ".shortcut." not in key}
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, plain.state_dict()[key]) for key, tensor in state.items())
    assert [level["reduction"] for level in er.feature_info] == [level["reduction"] for level in plain.feature_info]
    assert er(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_stochastic_depth_is_converted(timm):
    plain = timm.create_model("resnet18", num_classes=3, drop_path_rate=0.3)
    er = convert_resnet(plain)
    for stage in ("layer1", "layer4"):
        for block, other in zip(er.get_submodule(stage), plain.get_submodule(stage), strict=True):
            assert getattr(getattr(block, "drop_path", None), "rate", 0) == getattr(other.drop_path, "drop_prob", 0)
    assert er(torch.randn(2, 3, 64, 64)).shape == (2, 3)


def test_calibrated_conversion(timm):
    torch.manual_seed(0)
    plain, x = timm.create_model("resnetblur18", num_classes=3).eval(), torch.randn(2, 3, 64, 64)
    assert logit_agreement(plain, convert_resnet(plain, calibrate=[x]), [x + 0.1]).relative_error < 1e-4
    attention = timm.create_model("seresnet18", num_classes=3)
    with pytest.raises(ValueError, match=r"calibrate: layer1\.1\.se scales whatever the bias of the last BatchNorm"):
        convert_resnet(attention, calibrate=[x])


@pytest.mark.parametrize(
    ("name", "kw", "message"),
    [
        ("skresnet18", {}, r"layer1\.0\.conv1 is a SelectiveKernel, expected a Conv2d"),
        ("resnest14d", {}, r"layer1\.0\.conv2 is a SplitAttn, expected a Conv2d"),
        ("resnetv2_50", {}, r"\(ResNetV2\) has no conv1"),
        ("resnet18", {"drop_block_rate": 0.2}, r"layer3\.0\.drop_block is a DropBlock2d: .*set its rate to 0"),
        ("resnet18", {"block_args": {"attn_layer": "cbam"}}, r"layer1\.0\.se is a CbamModule: .*Of attention, Ceca"),
    ],
)
def test_refused_conversions(timm, name, kw, message):
    with pytest.raises(ValueError, match=message):
        convert_resnet(timm.create_model(name, num_classes=3, **kw))


def test_data_configuration(timm):
    config = timm.data.resolve_model_data_config(timm.create_model("er_resnet18"))
    assert config["input_size"] == (3, 224, 224) and config["mean"] == (0.485, 0.456, 0.406)


SUITE = """
import sys, pytest, timm, torch, ernet_fast.models.timm_models
names = timm.list_models("er_resnet*")
assert len(names) == 5
timm.list_pretrained = lambda *_, **__: []
timm.list_models = lambda *filters, **kw: [] if filters or kw.keys() & {"filter", "pretrained"} else [sys.argv[2]]

class Precision:
    @staticmethod
    def pytest_runtest_setup(item):
        torch.set_default_dtype(torch.float64 if "forward_fx" in item.name else torch.float32)

selection = ["-k", f"{sys.argv[2]} and not torchscript"]
arguments = ["-q", "-p", "no:cacheprovider", "-W", "ignore", sys.argv[1], *selection]
sys.exit(pytest.main(arguments, plugins=[Precision]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_timms_own_suite(timm, depth):
    """tests/test_models.py of timm's source distribution, with this library's network in place of its own.

    The test of a traced network compares logits with an absolute tolerance of 1e-5, meant for operators that are traced
    as they run. Tracing records the plain composition, and untrained logits grow with the depth, to about 1e5 in
    er_resnet152, where that is far below the rounding error of float32. So this test runs in float64.
    """
    suite = os.environ.get("TIMM_TEST_MODELS")
    if suite is None:
        pytest.skip("set TIMM_TEST_MODELS to tests/test_models.py of timm's source distribution")
    command = [sys.executable, "-c", SUITE, suite, f"er_resnet{depth}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert run.returncode == 0 and "9 passed" in run.stdout, run.stdout[-4000:]


def test_without_timm(monkeypatch):
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.models", None)
    with pytest.raises(ImportError, match="timm is needed for timm.create_model with ER-ResNets"):
        importlib.import_module(MODULE)
