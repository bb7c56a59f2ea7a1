"""ER-ResNets in timm's registry. Importing this module is all that it takes:

    import timm, ernet_fast.models.timm_models
    model = timm.create_model("er_resnet50", num_classes=2, in_chans=3, drop_rate=0.2)
    features = timm.create_model("er_resnet18", features_only=True, out_indices=(2, 3, 4))

Arguments beyond timm's own (`norm`, `fused`, `weights`, ...) are those of `ernet_fast.er_resnet50`. No weights are
published; `weights=` takes a file of torchvision's or timm's ResNet of the same depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ernet_fast._optional import require
from ernet_fast.models import resnet
from ernet_fast.models.resnet import LAYERS, ERResNet

_timm = require("timm.models", extra="timm", purpose="timm.create_model with ER-ResNets")

default_cfgs = _timm.generate_default_cfgs(
    {
        f"er_resnet{depth}": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "conv1",
            "classifier": "fc",
        }
        for depth in LAYERS
    }
)


def _network(depth: int) -> Callable[..., ERResNet]:
    """Builds an ER-ResNet from timm's names of arguments."""
    build: Callable[..., ERResNet] = getattr(resnet, f"er_resnet{depth}")

    def network(*, in_chans: int = 3, global_pool: str = "avg", **kw: Any) -> ERResNet:
        if global_pool != "avg":
            raise ValueError(
                f"global_pool must be 'avg', got {global_pool!r}; forward_features gives the map before it."
            )
        return build(in_channels=in_chans, **kw)

    return network


def _create(depth: int, pretrained: bool, kw: dict[str, Any]) -> nn.Module:
    if pretrained:
        raise RuntimeError(
            f"no pretrained weights of er_resnet{depth} are published: use pretrained=False, with weights=PATH of a "
            "ResNet's state dict if you have one."
        )
    model: nn.Module = _timm.build_model_with_cfg(_network(depth), f"er_resnet{depth}", False, **kw)
    return model


@_timm.register_model
def er_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ER-ResNet-18 for `timm.create_model`."""
    return _create(18, pretrained, kwargs)


@_timm.register_model
def er_resnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ER-ResNet-34 for `timm.create_model`."""
    return _create(34, pretrained, kwargs)


@_timm.register_model
def er_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ER-ResNet-50 for `timm.create_model`."""
    return _create(50, pretrained, kwargs)


@_timm.register_model
def er_resnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ER-ResNet-101 for `timm.create_model`."""
    return _create(101, pretrained, kwargs)


@_timm.register_model
def er_resnet152(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ER-ResNet-152 for `timm.create_model`."""
    return _create(152, pretrained, kwargs)
