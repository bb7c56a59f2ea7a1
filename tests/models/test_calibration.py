"""Converted networks that start close to the plain ResNet, how close, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ernet_fast import convert_resnet, er_resnet18, fold_for_inference, logit_agreement, to_plain
from ernet_fast.models import ERResNet

Plain = Callable[..., nn.Module]


def images(count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(plain_resnet: Plain, layers: tuple[int, ...], **kw: object) -> nn.Module:
    """A network whose statistics, scales and shifts are no initial values."""
    torch.manual_seed(0)
    model = plain_resnet(layers, **kw).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 1.0)
            nn.init.normal_(module.bias, 0.0, 0.3)
    for seed in range(6):
        model(images(8, 100 + seed))
    return model.eval()


@pytest.mark.parametrize("bottleneck", [False, True])
def test_stages_of_two_blocks_keep_the_function(plain_resnet: Plain, bottleneck: bool) -> None:
    """x_0 is behind its ReLU, so block 1 adds just what the plain block does: in evaluation, and there and back."""
    model = trained(plain_resnet, (2, 2, 1, 2), bottleneck=bottleneck)
    before = copy.deepcopy(model.state_dict())
    er = convert_resnet(model, calibrate=[images()])
    x = images(3, seed=7)
    torch.testing.assert_close(er(x), model(x), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    plain = to_plain(er)
    state = plain.state_dict()
    assert state.keys() == before.keys() and not plain.training
    for name, tensor in before.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-9, atol=1e-9, msg=name)
    torch.testing.assert_close(plain(x), er(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(convert_resnet(plain, calibrate=[images()])(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_deeper_stages_start_close(plain_resnet: Plain, bottleneck: bool) -> None:
    """Closer than weights and statistics that say x_i, which is what the sum would be without inner ReLUs."""
    model = trained(plain_resnet, (2, 5, 3, 1), bottleneck=bottleneck)
    batches = [(images(8, seed), torch.zeros(8)) for seed in range(2)]
    calibrated = convert_resnet(model, calibrate=batches)
    others = [images(16, seed=50)]
    found, as_converted = (logit_agreement(model, er, others) for er in (calibrated, convert_resnet(model)))
    assert found.images == 16
    assert found.correlation > as_converted.correlation and found.correlation > 0.9
    assert found.relative_error < as_converted.relative_error and found.relative_error < 0.3
    # in training the batch's own statistics are taken, which are those of the images to sampling
    x = torch.cat([x for x, _ in batches])
    evaluated = calibrated(x)
    trains = copy.deepcopy(calibrated)
    for module in trains.modules():
        if hasattr(module, "shortcut"):
            module.shortcut.train()
    assert float((trains(x) - evaluated).detach().norm() / evaluated.detach().norm()) < 1e-2
    with pytest.raises(ValueError, match=r"layer2\.\d\.shortcut reads \d maps before their ReLU"):
        to_plain(calibrated)


def test_statistics_are_those_of_the_network(plain_resnet: Plain) -> None:
    """Running statistics of every shortcut are the moments of the maps that it reads, whoever measures them.

    While they are measured N divides by the biased deviation, which is 1 / (2 * 2048) smaller for 8 maps of 16x16.
    """
    model = trained(plain_resnet, (4, 1, 1, 1))
    er = convert_resnet(model, calibrate=[images(4, 1), images(4, 2)])
    measured = copy.deepcopy(er)
    for block in list(measured.layer1)[1:]:
        block.shortcut.train().momentum = 1.0
    measured(torch.cat([images(4, 1), images(4, 2)]))
    found = {name: tensor for name, tensor in measured.state_dict().items() if "shortcut.running" in name}
    assert len(found) == 6
    for name, tensor in found.items():
        torch.testing.assert_close(er.state_dict()[name], tensor, rtol=4 / 2048, atol=4 / 2048, msg=name)


def test_dtype_layout_and_dead_channels(plain_resnet: Plain) -> None:
    model = trained(plain_resnet, (2, 3, 1, 1)).float().to(memory_format=torch.channels_last)
    for bn in (model.layer2[0].bn2, model.layer2[0].downsample[1]):
        nn.init.zeros_(bn.weight[3:5])
        nn.init.constant_(bn.bias[3:5], -1.0)
    er = convert_resnet(model, calibrate=[images().float()])
    assert all(bool(tensor.isfinite().all()) for tensor in er.state_dict().values())
    assert logit_agreement(model, er, [images(8, 3)]).relative_error < 0.3
    half = convert_resnet(model.bfloat16(), calibrate=[images()])
    assert half.layer2[1].shortcut.weight.dtype == torch.bfloat16
    assert logit_agreement(model, half, [images(8, 3)]).relative_error < 0.3


def test_what_cannot_be_calibrated(plain_resnet: Plain) -> None:
    model = plain_resnet()
    with pytest.raises(ValueError, match="calibrate needs norm='batch'"):
        convert_resnet(model, norm="group", num_groups=2, calibrate=[images().float()])
    with pytest.raises(ValueError, match="calibrate holds no images"):
        convert_resnet(model, calibrate=[])
    with pytest.raises(ValueError, match=r"a batch must be images \[N, C, H, W\].* got \[3, 64, 64\]"):
        convert_resnet(model, calibrate=images())


def test_agreement() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 64 * 64, 4)).double()
    same = logit_agreement(model, copy.deepcopy(model).float(), [images(5), images(0), (images(3), None)])
    assert model.training and model[1].training
    assert same.images == 8 and same.top1 == 1.0
    assert same.correlation == pytest.approx(1.0) and same.relative_error < 1e-5
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[2].weight.neg_()
        other[2].bias.neg_()
    found = logit_agreement(model, other, [images(5)])
    assert found.top1 < 1.0 and found.correlation == pytest.approx(-1.0) and found.relative_error == pytest.approx(2.0)
    assert str(found).startswith("5 images: same class ")
    with pytest.raises(ValueError, match="hold no images"):
        logit_agreement(model, other, [])
    with pytest.raises(ValueError, match=r"expected logits \[N, classes\] of both, got \[2, 4\], \[2, 12288\]"):
        logit_agreement(model, other[:1].append(nn.BatchNorm1d(12288).double()), [images(2)])


def test_to_plain_of_blocks_without_shortcuts_and_what_it_refuses() -> None:
    torch.manual_seed(0)
    model = ERResNet("bottleneck", (1, 3, 2, 1), 3, base_channels=8).double()
    for _ in range(2):
        model(images())
    model.eval()
    with pytest.raises(ValueError, match=r"layer2\.1\.shortcut is not the identity"):
        to_plain(model)
    for name, weight in model.named_parameters():
        if name.endswith("shortcut.weight"):
            nn.init.zeros_(weight)
    plain, x = to_plain(model), images(2, 5)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)
    assert not any("shortcut" in name for name in plain.state_dict())
    with pytest.raises(ValueError, match=r"layer2\.1 is no ER block with an ERShortcut .*: FoldedShortcut"):
        to_plain(fold_for_inference(model))
    with pytest.raises(ValueError, match=r"layer1\.1\.shortcut normalises with the batch at hand"):
        to_plain(er_resnet18(2, base_channels=8, norm="group", num_groups=2))
    with pytest.raises(TypeError, match="got Linear"):
        to_plain(nn.Linear(1, 1))
