"""Named sets of settings, to begin from."""

from __future__ import annotations

from typing import Any

PROTOCOLS: dict[str, dict[str, Any]] = {
    # The ERNet paper's training. Ranges of augmentation, constant rate, no weight decay and squeeze are our reading.
    "paper": {
        "split_by": "image", "num_folds": 5, "image_size": 224, "resize": "squeeze",
        "optimizer": "adam", "lr": 1e-4, "betas": (0.6, 0.8), "weight_decay": 0.0, "schedule": "constant",
        "batch_size": 16, "epochs": 100, "label_smoothing": 0.0, "class_weights": "none", "sampling": "shuffled",
        "augment": True, "flips": True, "quarter_turns": False, "rotation": 30.0, "translation": 0.1,
        "zoom": (0.8, 1.2), "crop": 0.8, "stain_gain": 0.0, "stain_shift": 0.0, "stain": "macenko",
        "stain_fit": "image", "ema": None, "precision": "32-true",
    },
    # What a study of new patients would do today.
    "recommended": {
        "split_by": "patient", "num_folds": 5, "image_size": 224, "resize": "shorter",
        "optimizer": "adamw", "lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.05, "schedule": "cosine",
        "warmup_epochs": 5.0, "batch_size": 32, "epochs": 60, "label_smoothing": 0.1, "class_weights": "none",
        "sampling": "shuffled", "augment": True, "flips": True, "quarter_turns": True, "rotation": 15.0,
        "translation": 0.05, "zoom": (0.9, 1.1), "crop": 1.0, "stain_gain": 0.0, "stain_shift": 0.0,
        "stain": "macenko", "stain_fit": "image", "clip_norm": 1.0, "ema": 0.999, "precision": "bf16-mixed",
    },
    # The published folds of BreakHis: give one with split_file=dsfold1.txt. They validate on none.
    "spanhol": {"split_by": "patient", "fit_on": "trainval", "target": "binary"},
}  # fmt: skip
"""Protocol to its settings; whatever is not named has the default of `TrainConfig`."""
