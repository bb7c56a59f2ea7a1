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


def _entrypoint(depth: int) -> Callable[..., nn.Module]:
    """What timm calls to create an ER-ResNet; it is registered under its name."""
    name = f"er_resnet{depth}"

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise RuntimeError(
                f"no pretrained weights of {name} are published: use pretrained=False, with weights=PATH of a "
                "ResNet's state dict if you have one."
            )
        model: nn.Module = _timm.build_model_with_cfg(_network(depth), name, False, **kwargs)
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"ER-ResNet-{depth} for `timm.create_model`."
    return create


for _depth in LAYERS:
    globals()[f"er_resnet{_depth}"] = _timm.register_model(_entrypoint(_depth))
