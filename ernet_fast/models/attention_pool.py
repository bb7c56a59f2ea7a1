"""Attention over the fields of a slide at several magnifications: from embeddings to one prediction a bag."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

POOLS = ("gated", "multihead")


class BagOutput(NamedTuple):
    """Logits [B, K] of B bags, and the weights [B, N] of their fields: 0 where there is none, sums of 1."""

    logits: Tensor
    weights: Tensor


class GatedAttention(nn.Module):
    """Gated attention pooling: a_k = softmax_k(w . (tanh(V h_k) * sigmoid(U h_k))), z = sum_k a_k h_k.

    Equations 8 and 9 of Ilse, Tomczak and Welling, "Attention-based deep multiple instance learning", ICML 2018. Each
    field is weighed by itself; the softmax alone relates it to the others.

    Args:
        features: D, of an embedding.
        hidden: rows of V and U.
    """

    def __init__(self, features: int, hidden: int = 64) -> None:
        super().__init__()
        self.content = nn.Linear(features, hidden)
        self.gate = nn.Linear(features, hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(self, fields: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled [B, D] and weights [B, N] of fields [B, N, D], of which those that are `there` [B, N] count."""
        scores = self.score(self.content(fields).tanh() * self.gate(fields).sigmoid())[..., 0]
        weights = scores.masked_fill(~there, float("-inf")).softmax(dim=1)
        return (weights[..., None] * fields).sum(dim=1), weights


class MultiHeadAttention(nn.Module):
    """Self-attention among a bag's fields, of all magnifications together, then a learned query that pools them.

    h' = h + SelfAttention(LayerNorm(h)); z = Attention(query, LayerNorm(h')). The weights are the query's, the mean of
    its heads (Vaswani et al., "Attention is all you need", NeurIPS 2017).

    Args:
        features: D, a multiple of `heads`.
        heads: number of heads of either attention.
        dropout: of attention weights while training.
    """

    def __init__(self, features: int, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(features), nn.LayerNorm(features)
        self.among = nn.MultiheadAttention(features, heads, dropout=dropout, batch_first=True)
        self.pool = nn.MultiheadAttention(features, heads, batch_first=True)
        self.query = nn.Parameter(torch.randn(1, 1, features) * features**-0.5)

    def forward(self, fields: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled [B, D] and weights [B, N] of fields [B, N, D], of which those that are `there` [B, N] count."""
        normed = self.before(fields)
        fields = fields + self.among(normed, normed, normed, key_padding_mask=~there, need_weights=False)[0]
        fields = self.after(fields)
        query = self.query.expand(len(fields), -1, -1)
        pooled, weights = self.pool(query, fields, fields, key_padding_mask=~there)
        return pooled[:, 0], weights[:, 0]


class MagnificationAttention(nn.Module):
    """Class of a bag of fields: each embedding is projected, told its magnification, pooled by attention, classified.

    Args:
        in_features: length of an embedding, e.g. `head_hidden_size` of an ER-ResNet.
        num_classes: K.
        magnifications: those that fields may have; each has a learned vector that is added to its fields.
        pool: "gated" (`GatedAttention`) or "multihead" (`MultiHeadAttention`).
        features: length of a projected embedding.
        heads: of pool="multihead".
        dropout: of projected embeddings while training.

    Raises:
        ValueError: another pool, no magnification or one twice, or `features` that `heads` do not divide.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        magnifications: Sequence[int] = (40, 100, 200, 400),
        pool: str = "gated",
        features: int = 64,
        heads: int = 4,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool={pool!r}; expected one of {', '.join(map(repr, POOLS))}.")
        if not magnifications or len(set(magnifications)) != len(magnifications):
            raise ValueError(f"magnifications={tuple(magnifications)}; expected one or more, each once.")
        if pool == "multihead" and features % heads:
            raise ValueError(f"features={features}, heads={heads}; expected a multiple of the heads.")
        self.magnifications = tuple(magnifications)
        self.normalize = nn.LayerNorm(in_features)
        self.project = nn.Linear(in_features, features)
        self.magnification = nn.Embedding(len(self.magnifications), features)
        nn.init.normal_(self.magnification.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.pool = GatedAttention(features) if pool == "gated" else MultiHeadAttention(features, heads)
        self.classify = nn.Linear(features, num_classes)

    def forward(self, embeddings: Tensor, magnification: Tensor, there: Tensor | None = None) -> BagOutput:
        """Logits and weights of B bags of up to N fields.

        Args:
            embeddings: floating point [B, N, in_features]; anything where there is no field.
            magnification: int64 [B, N], 40, 100, ... of each field; any of those known where there is no field.
            there: bool [B, N]; default: every field is there.

        Raises:
            ValueError: a magnification is not known, or a bag is empty.
        """
        there = torch.ones_like(magnification, dtype=torch.bool) if there is None else there
        if not there.any(dim=1).all():
            raise ValueError("a bag has no field.")
        known = torch.tensor(self.magnifications, device=magnification.device)
        match = magnification[..., None] == known
        if not match.any(dim=-1).all():
            raise ValueError(f"a magnification is none of {self.magnifications}.")
        embeddings = embeddings.masked_fill(~there[..., None], 0.0)
        fields = torch.relu(self.project(self.normalize(embeddings))) + self.magnification(match.long().argmax(dim=-1))
        pooled, weights = self.pool(self.dropout(fields), there)
        return BagOutput(self.classify(pooled), weights)
