"""Training, evaluation and reports. Needs the extra `train`: ``pip install 'ernet_fast[train]'``.

Importing this package loads none of the optional packages; its functions load what they need.
"""

from __future__ import annotations

from ernet_fast.console.progress import Reporter
from ernet_fast.train.bootstrap import Bootstrap
from ernet_fast.train.checkpoint import load_checkpoint
from ernet_fast.train.comparison import Comparison, compare
from ernet_fast.train.config import TrainConfig
from ernet_fast.train.evaluation import Evaluation, evaluate
from ernet_fast.train.graphed_step import GraphedStep
from ernet_fast.train.loop import TrainResult, fit
from ernet_fast.train.loss_watch import TrainingDivergedError
from ernet_fast.train.metrics import (
    compute_metrics,
    metrics_by_magnification,
    patient_metrics,
    patient_recognition_rate,
)  # fmt: skip
from ernet_fast.train.predictions import Predictions
from ernet_fast.train.protocols import PROTOCOLS
from ernet_fast.train.stop_signals import TrainingStoppedError

__all__ = [
    "PROTOCOLS", "Bootstrap", "Comparison", "Evaluation", "GraphedStep", "Predictions", "Reporter", "TrainConfig",
    "TrainResult", "TrainingDivergedError", "TrainingStoppedError", "compare", "compute_metrics", "evaluate", "fit",
    "load_checkpoint", "metrics_by_magnification", "patient_metrics", "patient_recognition_rate",
]  # fmt: skip
