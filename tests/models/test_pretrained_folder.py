"""Networks as local folders: what `save_pretrained` writes, `from_pretrained` reads, or a clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ernet_fast import convert_resnet, er_resnet18, er_resnet50, fold_for_inference
from ernet_fast.models import ERResNet

pytest.importorskip("safetensors", reason="needs safetensors")


def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def trained(model: ERResNet) -> ERResNet:
    torch.manual_seed(0)
    model(images().to(next(model.parameters()).dtype))
    return model.eval()


@pytest.mark.parametrize(
    "build",
    [
        lambda: er_resnet18(3, base_channels=8),
        lambda: er_resnet50(2, base_channels=8, groups=2, width_per_group=32, replace_stride_with_dilation=(0, 1, 1)),
        lambda: er_resnet18(4, base_channels=8, norm="group", num_groups=4, drop_path_rate=0.2, global_pool="avgmax"),
        lambda: er_resnet18(2, base_channels=8, block="er133", drop_rate=0.1).to(torch.bfloat16),
        lambda: ERResNet("basic", (1, 2, 1, 1), 0, base_channels=4, global_pool="").to(
            memory_format=torch.channels_last
        ),
    ],
)
def test_round_trip(build: Callable[[], ERResNet], tmp_path: Path) -> None:
    model = trained(build())
    assert model.save_pretrained(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    loaded = ERResNet.from_pretrained(tmp_path / "a" / "b")
    own = model.state_dict()
    assert loaded.state_dict().keys() == own.keys() and not loaded.training
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, own[name]) and tensor.dtype == own[name].dtype, name
    x = images().to(next(model.parameters()).dtype)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)
    assert (loaded.num_classes, loaded.pool_type, loaded.drop_rate) == (
        model.num_classes,
        model.pool_type,
        model.drop_rate,
    )
    assert loaded.arguments == model.arguments
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    loaded.train()(x).float().sum().backward()


def test_changes_of_the_head_and_of_the_call(tmp_path: Path) -> None:
    model = trained(er_resnet18(3, base_channels=8))
    model.reset_classifier(5, "catavgmax")
    model.save_pretrained(tmp_path)
    loaded = ERResNet.from_pretrained(tmp_path, fused=False, drop_rate=0.3)
    assert (loaded.num_classes, loaded.head_hidden_size, loaded.drop_rate, loaded.fused) == (5, 128, 0.3, False)
    torch.testing.assert_close(loaded(images()), model(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kw", [{}, {"bottleneck": True, "groups": 2}, {"bottleneck": True, "widening": 2}])
def test_converted_networks(plain_resnet: Callable[..., nn.Module], kw: dict[str, Any], tmp_path: Path) -> None:
    er = trained(convert_resnet(plain_resnet((2, 2, 1, 2), in_channels=3, **kw)))
    er.save_pretrained(tmp_path)
    loaded = ERResNet.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(images()), er(images()), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_saved(plain_resnet: Callable[..., nn.Module], tmp_path: Path) -> None:
    plain = plain_resnet((1, 1, 1, 1))
    plain.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))
    for model, message in (
        (convert_resnet(plain), r"conv1 is missing, and the constructor makes it Conv2d\(3, 8, kernel_size=\(7, 7\)"),
        (
            fold_for_inference(er_resnet18(2, base_channels=8).eval()),
            r"conv1 is Conv2d.*, and the constructor makes it",
        ),
    ):
        with pytest.raises(ValueError, match=message + ".*[\n ]*.*Save it by torch.save"):
            model.save_pretrained(tmp_path)
    model = er_resnet18(2, base_channels=8)
    model.layer2[1].conv1.dilation = (2, 2)
    with pytest.raises(ValueError, match=r"layer2\.1\.conv1 is Conv2d\(.*dilation=\(2, 2\)"):
        model.save_pretrained(tmp_path)
    del model.arguments
    with pytest.raises(ValueError, match="did not keep its arguments"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json in .*: expected the folder of save_pretrained"):
        ERResNet.from_pretrained(tmp_path / "timm" / "er_resnet18")
    er_resnet18(2, base_channels=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit config\.json.*size mismatch for conv1\.weight"):
        ERResNet.from_pretrained(tmp_path, base_channels=16)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "ernet_fast": {**config["ernet_fast"], "format": 9}}))
    with pytest.raises(ValueError, match="has format 9; this version reads format 1"):
        ERResNet.from_pretrained(tmp_path)
    for text in ("{}", "[", "[]", '{"ernet_fast": 3}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json is no configuration of save_pretrained"):
            ERResNet.from_pretrained(tmp_path)
