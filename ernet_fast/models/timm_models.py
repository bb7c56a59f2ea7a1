"""ER-ResNets in timm's registry. Importing this module registers them:

    import timm, ernet_fast.models.timm_models
    model = timm.create_model("er_resnet50", num_classes=2, in_chans=3, drop_rate=0.2)
    features = timm.create_model("er_resnet18", features_only=True, out_indices=(2, 3, 4))

Arguments beyond timm's own (`norm`, `fused`, `weights`, ...) are those of `ernet_fast.er_resnet50`. No weights are
published; timm loads a user's own (`pretrained_cfg_overlay=dict(file=...)`, "local-dir:...", `checkpoint_path`), also
those of a plain ResNet of the same depth, which leave the shortcuts untrained.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from ernet_fast._optional import require
from ernet_fast.models import depths
from ernet_fast.models.depths import LAYERS
from ernet_fast.models.resnet import ERResNet
from ernet_fast.models.weights import is_shortcut_entry

_timm = require("timm.models", extra="timm", purpose="timm.create_model with ER-ResNets")

_DILATED_STAGES = {32: (False, False, False), 16: (False, False, True), 8: (False, True, True)}

default_cfgs = _timm.generate_default_cfgs(
    {
        f"er_resnet{depth}": {
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
    build: Callable[..., ERResNet] = getattr(depths, f"er_resnet{depth}")

    def network(
        *, in_chans: int = 3, output_stride: int | None = None, zero_init_last: bool = False, **kw: Any
    ) -> ERResNet:
        if "in_channels" in kw:
            raise TypeError("in_channels is called in_chans in timm; pass that")
        if zero_init_last:
            raise ValueError(
                "zero_init_last=True is not offered: shortcuts normalise every map, and at a scale of 0 the "
                "normaliser's derivative is 1/sqrt(eps); expected False"
            )
        if output_stride is not None:
            if output_stride not in _DILATED_STAGES:
                raise ValueError(f"output_stride must be one of {sorted(_DILATED_STAGES)}, got {output_stride}")
            kw["replace_stride_with_dilation"] = _DILATED_STAGES[output_stride]
        model = build(in_channels=in_chans, **kw)
        model.register_load_state_dict_pre_hook(_keep_shortcuts)
        return model

    return network


def _keep_shortcuts(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let the weights of a plain ResNet load into an ER-ResNet, whose shortcuts stay as they are.

    timm loads strictly and offers no other place to complete what a file holds.
    """
    shortcuts = {prefix + key: value for key, value in model.state_dict().items() if is_shortcut_entry(key)}
    if prefix + "conv1.weight" in state_dict and state_dict.keys().isdisjoint(shortcuts):
        advice = "the ER shortcuts keep theirs, and need training before evaluation"
        warnings.warn(f"the weights are of a plain ResNet: {advice}", stacklevel=2)
        state_dict.update(shortcuts)


def _entrypoint(depth: int) -> Callable[..., nn.Module]:
    """What timm calls to create an ER-ResNet; it is registered under its name."""
    name = f"er_resnet{depth}"

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        sources = {key: kwargs.get(key) for key in ("pretrained_cfg", "pretrained_cfg_overlay")}
        config = _timm.resolve_pretrained_cfg(name, **sources) if pretrained else None
        if config is not None and not (config.has_weights or config.state_dict):
            raise RuntimeError(
                f"no pretrained weights of {name} are published: use pretrained=False, or name a file of your own with "
                "pretrained_cfg_overlay=dict(file=PATH), or with weights=PATH and pretrained=False."
            )
        return _timm.build_model_with_cfg(_network(depth), name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"ER-ResNet-{depth} for `timm.create_model`."
    return create


for _depth in LAYERS:
    globals()[f"er_resnet{_depth}"] = _timm.register_model(_entrypoint(_depth))
