"""What an evaluation found: predictions, figures of them, their intervals, the worst mistakes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ernet_fast.data import Skipped
from ernet_fast.diagnosis import environment
from ernet_fast.train import metrics
from ernet_fast.train.bootstrap import Bootstrap, all_intervals
from ernet_fast.train.mistakes import Mistake
from ernet_fast.train.predictions import Predictions


@dataclass(frozen=True)
class Findings:
    """Predictions on a set of images, and metrics of them.

    `seen_images` of the images were trained on, and `seen_patients` of their patients: if any, the metrics say less
    about new patients. `inputs` are the settings that chose the images, `settings` those of the training, `history`
    its epochs, all as plain values. `bootstrap` says how intervals are made; None makes none. `mistakes` are the images
    that the network was most wrong about, as many as were asked for.
    """

    predictions: Predictions
    checkpoint: Path
    epoch: int
    split: str
    skipped: tuple[Skipped, ...]
    seen_images: int
    seen_patients: int
    inputs: dict[str, Any]
    settings: dict[str, Any]
    history: list[dict[str, Any]]
    bootstrap: Bootstrap | None = None
    mistakes: tuple[Mistake, ...] = ()

    @cached_property
    def intervals(self) -> dict[str, Any] | None:
        """The interval of every figure, see `bootstrap.all_intervals`; None without `bootstrap`."""
        return None if self.bootstrap is None else all_intervals(self.predictions, self.bootstrap)

    def figures(self) -> dict[str, Any]:
        """Every figure as a plain value: overall, by magnification, by patient, and the confusion matrix."""
        scores = metrics.patient_scores(self.predictions)
        by_patient: dict[str, Any] = {
            "overall": metrics.patient_metrics(self.predictions),
            "by_magnification": {
                name: metrics.patient_metrics(part) for name, part in self.predictions.by_magnification().items()
            },
        }
        return {
            "checkpoint": str(self.checkpoint),
            "epoch": self.epoch,
            "split": self.split,
            **self.inputs,
            "classes": list(self.predictions.classes),
            "loss": self.predictions.loss(),
            "overall": metrics.compute_metrics(self.predictions),
            "by_magnification": metrics.metrics_by_magnification(self.predictions),
            "patients": len(scores),
            "patient_recognition_rate": by_patient["overall"]["patient_recognition_rate"],
            "patient_auc": by_patient["overall"]["patient_auc"],
            "by_patient": by_patient,
            "patient_scores": scores,
            "intervals": self.intervals,
            "confusion_matrix": metrics.confusion_matrix(self.predictions).tolist(),
            "calibration": metrics.calibration_table(self.predictions).tolist(),
            "images_seen_in_training": self.seen_images,
            "patients_seen_in_training": self.seen_patients,
            "skipped": [{"path": str(path), "reason": reason} for path, reason in self.skipped],
            "mistakes": [mistake.facts(self.predictions.classes) for mistake in self.mistakes],
            "validation": self.history[-1]["val"] if self.history else None,
            "settings": self.settings,
            "environment": environment(),
        }
