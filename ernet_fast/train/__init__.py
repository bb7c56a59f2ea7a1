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
from ernet_fast.train.loop import TrainResult, fit
from ernet_fast.train.loss_watch import TrainingDivergedError
from ernet_fast.train.metrics import (
    compute_metrics,
    metrics_by_magnification,
    patient_metrics,
    patient_recognition_rate,
)  # fmt: skip
from ernet_fast.train.predictions import Predictions

__all__ = [
    "Bootstrap", "Comparison", "Evaluation", "Predictions", "Reporter", "TrainConfig", "TrainResult",
    "TrainingDivergedError", "compare", "compute_metrics", "evaluate", "fit", "load_checkpoint",
    "metrics_by_magnification", "patient_metrics", "patient_recognition_rate",
]  # fmt: skip
