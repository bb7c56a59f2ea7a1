"""ER-ResNets: blocks, stages, networks of 18 to 152 layers, loading of weights, conversion and operation counts."""

from __future__ import annotations

from ernet_fast.models.agreement import Agreement, logit_agreement
from ernet_fast.models.blocks import ERBasicBlock, ERBlock, ERBlock133, ERBottleneck, ProjectionBlock
from ernet_fast.models.convert import convert_resnet
from ernet_fast.models.depths import er_resnet18, er_resnet34, er_resnet50, er_resnet101, er_resnet152
from ernet_fast.models.explanation import Explanation, StageExplanation, explain
from ernet_fast.models.export import export_network, load_exported
from ernet_fast.models.flops import FlopCount, count_flops
from ernet_fast.models.folding import fold_for_inference
from ernet_fast.models.inference import optimize_for_inference
from ernet_fast.models.plain_resnet import build_plain_resnet
from ernet_fast.models.resnet import ERResNet
from ernet_fast.models.stage import ERStage
from ernet_fast.models.to_plain import to_plain
from ernet_fast.models.weights import load_torchvision_state_dict, read_weights

__all__ = [
    "Agreement", "ERBasicBlock", "ERBlock", "ERBlock133", "ERBottleneck", "ERResNet", "ERStage", "Explanation",
    "FlopCount", "ProjectionBlock", "StageExplanation", "build_plain_resnet", "convert_resnet", "count_flops",
    "er_resnet18", "er_resnet34", "er_resnet50", "er_resnet101", "er_resnet152", "explain", "export_network",
    "fold_for_inference", "load_exported", "load_torchvision_state_dict", "logit_agreement", "optimize_for_inference",
    "read_weights", "to_plain",
]  # fmt: skip
