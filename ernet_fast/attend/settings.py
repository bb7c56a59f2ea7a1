"""Settings of attention over magnifications."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ernet_fast.attend.bags import UNITS
from ernet_fast.models.attention_pool import POOLS


@dataclass(frozen=True, kw_only=True)
class AttendSettings:
    """How bags are made and the attention is trained.

    Attributes:
        by: what a bag is: the fields of a slide, or of a patient.
        pool: "gated" or "multihead".
        features: length of a projected embedding.
        heads: of pool="multihead".
        dropout: of projected embeddings.
        epochs: passes over the training bags with the network as it is.
        tune_epochs: further passes that train the network too (end to end).
        fields: fields of a bag in a training step, chosen anew each time; all of them are used otherwise.
        batch_size: bags a step.
        lr: learning rate of AdamW.
        tune_lr: that of the network, end to end.
        weight_decay: of AdamW.
        seed: of weights, order and choice of fields.

    Raises:
        ValueError: a value is out of range.
    """

    by: str = "slide"
    pool: str = "gated"
    features: int = 64
    heads: int = 4
    dropout: float = 0.25
    epochs: int = 60
    tune_epochs: int = 0
    fields: int = 16
    batch_size: int = 8
    lr: float = 1e-3
    tune_lr: float = 1e-5
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("by", UNITS), ("pool", POOLS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}; expected one of {', '.join(map(repr, choices))}.")
        whole = ("features", "heads", "epochs", "fields", "batch_size", "tune_epochs", "seed")
        for name in whole:
            least = 0 if name in ("tune_epochs", "seed") else 1
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}; expected an integer of at least {least}.")
        for name in ("dropout", "lr", "tune_lr", "weight_decay"):
            value = getattr(self, name)
            if not 0 <= value < (1 if name == "dropout" else math.inf):
                raise ValueError(f"{name}={value!r}; expected a number from 0{' to below 1' * (name == 'dropout')}.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return asdict(self)
