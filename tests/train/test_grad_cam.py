"""Grad-CAM on ER and plain networks: by hand, where hooks are, what it leaves alone; agreement with the library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ernet_fast import er_resnet18
from ernet_fast.train.grad_cam import grad_cam, last_feature_layer


class Tiny(nn.Module):
    """One convolution, global mean, one linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.conv(x).mean(dim=(2, 3)))


def test_by_hand():
    """Of a global mean and a linear layer the weights are those of the class, over the number of pixels."""
    torch.manual_seed(0)
    network, images, classes = Tiny().double(), torch.randn(3, 3, 6, 6, dtype=torch.float64), torch.tensor([2, 0, 1])
    found = grad_cam(network, images, classes)
    maps = (network.fc.weight[classes][:, :, None, None] / 36 * network.conv(images)).sum(dim=1).relu()
    expected = (maps - maps.amin((1, 2), keepdim=True)) / (maps.amax((1, 2)) - maps.amin((1, 2)))[:, None, None]
    assert torch.allclose(found, expected.float(), atol=1e-6)


def er_network(**settings) -> nn.Module:
    torch.manual_seed(1)
    network = er_resnet18(2, base_channels=8, **settings)
    network(torch.randn(4, 3, 64, 64))  # running statistics of something
    with torch.no_grad():  # what speaks against one class speaks for the other
        network.fc.weight[1] = -network.fc.weight[0]
    return network.eval()


@pytest.mark.parametrize("layer", ["layer4", "layer3", "layer4.1", "layer2.0.conv1"])
def test_any_layer_of_an_er_network_can_be_looked_at(layer):
    network, images = er_network(), torch.randn(6, 3, 64, 64)
    before = network(images)
    found = grad_cam(network, images, torch.arange(6) % 2, layer=network.get_submodule(layer))
    assert found.shape == (6, 64, 64) and found.dtype == torch.float32
    assert 0 <= found.min() and found.max() <= 1 and (found.amax(dim=(1, 2)) > 0.999).any()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(network(images), before), "the hook is gone"


@pytest.mark.parametrize("settings", [{}, {"memory": "lean"}, {"fused": False}, {"norm": "group", "num_groups": 4}])
def test_the_last_stage_is_weighed_by_the_classifier(settings):
    """Pooling and a linear layer follow it."""
    network = er_network(**settings)
    images, classes = torch.randn(6, 3, 64, 64), torch.arange(6) % 2
    maps = (network.fc.weight[classes][:, :, None, None] * network.forward_features(images)).sum(dim=1).relu()
    large = nn.functional.interpolate(maps[:, None], (64, 64), mode="bilinear")[:, 0]
    low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    assert (high > 0).any()
    expected = (large - low) / (high - low).clamp_min(1e-30)
    assert torch.allclose(grad_cam(network, images, classes), expected.detach(), atol=1e-4)


def test_the_layer_is_the_last_stage_or_the_last_convolution():
    network = er_network()
    assert last_feature_layer(network) is network.layer4 and isinstance(last_feature_layer(Tiny()), nn.Conv2d)
    with pytest.raises(ValueError, match="neither layer4 nor a convolution"):
        last_feature_layer(nn.Linear(2, 2))


def test_agrees_with_the_library():
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs grad-cam, and a torchvision that loads: {error}")
    network, images, classes = er_network(), torch.randn(3, 3, 64, 64), torch.tensor([0, 1, 1])
    for layer in (network.layer4, network.layer3):
        found = grad_cam(network, images, classes, layer=layer)
        with GradCAM(model=network, target_layers=[layer]) as cam:
            expected = cam(input_tensor=images, targets=[ClassifierOutputTarget(int(k)) for k in classes])
        assert np.abs(found.numpy() - expected).max() < 1e-5
