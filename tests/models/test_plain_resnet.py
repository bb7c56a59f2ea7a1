"""The plain ResNet that is built here is torchvision's, and the control of an ER-ResNet."""

from __future__ import annotations

import pytest
import torch

from ernet_fast.models import build_plain_resnet, er_resnet18, er_resnet50
from ernet_fast.models.plain_resnet import check_plain_resnet


@pytest.mark.parametrize(("depth", "layers", "bottleneck"), [(18, (2, 2, 2, 2), False), (50, (3, 4, 6, 3), True)])
def test_names_and_output_are_torchvisions(plain_resnet, depth, layers, bottleneck):
    reference = plain_resnet(layers, bottleneck=bottleneck, num_classes=3)
    model = build_plain_resnet(depth, 3, base_channels=8)
    model.load_state_dict(reference.state_dict(), strict=True)
    check_plain_resnet(model)
    x = torch.randn(2, 3, 64, 64)
    for network in (model.train(), reference.train()):
        network.zero_grad()
    found, expected = model(x), reference(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(model.fc.weight.grad, reference.fc.weight.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.eval()(x), reference.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("depth", "parameters"),
    [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808)],
)
def test_parameter_counts_are_torchvisions(depth, parameters):
    with torch.device("meta"):
        model = build_plain_resnet(depth)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(("depth", "build"), [(18, er_resnet18), (50, er_resnet50)])
def test_it_starts_where_the_er_network_of_the_same_seed_does(depth, build):
    torch.manual_seed(5)
    er = build(2, base_channels=8).state_dict()
    torch.manual_seed(5)
    plain = build_plain_resnet(depth, 2, base_channels=8).state_dict()
    assert set(er) > set(plain) and all("shortcut" in name for name in set(er) - set(plain))
    assert all(torch.equal(plain[name], er[name]) for name in plain)


def test_weights_and_what_is_refused(tmp_path):
    source = build_plain_resnet(18, 2, base_channels=8)
    torch.save(source.state_dict(), tmp_path / "plain.pt")
    again = build_plain_resnet(18, 2, base_channels=8, weights=tmp_path / "plain.pt")
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), again.state_dict().values(), strict=True)
    )
    with pytest.raises(ValueError, match="depth=20; expected one of 18, 34, 50, 101, 152"):
        build_plain_resnet(20)
    again.reset_classifier(5)
    assert again(torch.randn(2, 3, 32, 32)).shape == (2, 5)
