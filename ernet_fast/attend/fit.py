"""Training of the attention over bags: on embeddings that are kept, then, if asked for, end to end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ernet_fast.attend.bags import Bag, Batch, chosen_fields, collate
from ernet_fast.attend.settings import AttendSettings
from ernet_fast.models.attention_pool import MagnificationAttention

Look = Callable[[Sequence[int]], Tensor]
"""Embeddings [n, D] of the images at these places."""


class Bags(NamedTuple):
    """Bags to train on and to choose the epoch by (none: the last epoch), and the magnification of every image."""

    train: list[Bag]
    val: list[Bag]
    magnification: Tensor


def train_attention(
    attention: MagnificationAttention,
    bags: Bags,
    look: Look,
    settings: AttendSettings,
    *,
    epochs: int,
    network: nn.Module | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Train in place and end with the weights of the epoch of the least validation loss; returns a record an epoch.

    The loss is the cross-entropy of bags, classes weighted inversely to their bags. Each step takes `settings.fields`
    fields of each bag at random. With `network` its parameters are trained too, at `settings.tune_lr`, through `look`,
    and are among the weights that are kept; its BatchNorms stay as they are.

    Raises FloatingPointError if the loss is not finite.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    groups = [{"params": [*attention.parameters()], "lr": settings.lr}]
    if network is not None:
        groups.append({"params": [*network.parameters()], "lr": settings.tune_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    modules = nn.ModuleList([attention] if network is None else [attention, network])
    weights = class_weights([bag.label for bag in bags.train], attention.classify.out_features)
    history: list[dict[str, Any]] = []
    best, kept = float("inf"), None
    for epoch in range(1, epochs + 1):
        attention.train()
        total = 0.0
        for batch in _batches(bags, look, settings, generator):
            loss = F.cross_entropy(attention(*batch[:3]).logits, batch.labels, weights.to(batch.labels.device))
            if not loss.isfinite():
                raise FloatingPointError(f"the loss is not finite in epoch {epoch}; try a lower learning rate.")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(batch.labels)
        val = None if not bags.val else bag_loss(attention, bags.val, look, bags.magnification, weights)
        history.append({"epoch": epoch, "train_loss": total / len(bags.train), "val_loss": val})
        if val is not None and val < best:
            best, kept = val, copy.deepcopy(modules.state_dict())
        advance()
    if kept is not None:
        modules.load_state_dict(kept)
    attention.eval()
    return history


def _batches(bags: Bags, look: Look, settings: AttendSettings, generator: torch.Generator) -> Iterator[Batch]:
    order = torch.randperm(len(bags.train), generator=generator).tolist()
    for begin in range(0, len(order), settings.batch_size):
        part = [bags.train[k] for k in order[begin : begin + settings.batch_size]]
        fields = [chosen_fields(bag, settings.fields, generator) for bag in part]
        yield collate(part, fields, [look(places) for places in fields], bags.magnification)


def class_weights(labels: Sequence[int], classes: int) -> Tensor:
    """Weights [K]: n / (number of occurring classes * count of the class), 0 for one that does not occur."""
    counts = torch.bincount(torch.tensor(labels), minlength=classes).float()
    return torch.where(counts > 0, counts.sum() / (counts.count_nonzero() * counts.clamp_min(1)), 0.0)


@torch.no_grad()
def bag_loss(
    attention: MagnificationAttention, bags: Sequence[Bag], look: Look, magnification: Tensor, weights: Tensor
) -> float:
    """Mean weighted cross-entropy over whole bags."""
    total, share = 0.0, 0.0
    for bag in bags:
        logits, _ = pooled(attention, bag, look, magnification)
        weight = float(weights[bag.label])
        total += weight * float(F.cross_entropy(logits, torch.tensor([bag.label])))
        share += weight
    return total / share if share else float("nan")


@torch.no_grad()
def pooled(attention: MagnificationAttention, bag: Bag, look: Look, magnification: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [1, K] and weights [N] of a whole bag, on the CPU."""
    attention.eval()
    batch = collate([bag], [bag.fields], [look(bag.fields)], magnification)
    output = attention(*batch[:3])
    return output.logits.float().cpu(), output.weights[0].float().cpu()
