"""Maps filed for one pass, and the weighted sums over them, with or without the stage's own backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ernet_fast.er import operators
from ernet_fast.er._autograd import FileMap, MapRecord, Tail, TailRecord


class FusedMaps:
    """Filed maps, and the weighted sums over them. One object serves one forward pass."""

    def __init__(self, *, per_sample: bool) -> None:
        """Args: per_sample: moments and coefficients per sample and channel (group norm), not per channel."""
        self.per_sample = per_sample
        self._maps: list[Tensor] = []
        self._tokens: list[Tensor | None] = []
        self._records: list[MapRecord] = []

    def file(self, z: Tensor, *, measure: bool, pass_on: bool = False) -> tuple[tuple[Tensor, Tensor] | None, Tensor]:
        """File a map [N, C, H, W].

        Args:
            z: the map; a copy is filed where it is not dense in the layout of the maps filed before.
            measure: take its moments.
            pass_on: z is used elsewhere too, and the gradient it gets there is to join that of the shortcuts: use the
                returned tensor there instead of z.

        Returns:
            Mean and biased variance ([C], or [N, C] with per_sample), or None; and z.
        """
        z = operators.in_layout(z, operators.layout_of([z, *self._maps[:1]]))  # where they differ, the last one decides
        record = MapRecord()
        token: Tensor | None = None
        # Compiled and exported programs use the operators' own autograd: plain and traceable, one gradient a pair.
        if z.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            mean, var, token, passed = FileMap.apply(z, record, measure, self.per_sample, pass_on)
            moments = (mean, var) if measure else None
            self._maps.append(z.detach())
        else:
            moments, passed = operators.channel_moments(z, self.per_sample) if measure else None, z
            self._maps.append(z)
        self._records.append(record)
        self._tokens.append(token)
        return moments, passed if pass_on else z

    def weighted_sum(self, a: Tensor, b: Tensor | None, relu: bool) -> Tensor:
        """`sum_l a[l] * z_l + b`, then ReLU if asked, over all filed maps; a [L, C] or [L, N, C], b [C] or [N, C]."""
        a = a.contiguous()
        tokens = [token for token in self._tokens if token is not None]
        differentiable = bool(tokens) or a.requires_grad or (b is not None and b.requires_grad)
        if not (differentiable and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return operators.weighted_sum(self._maps, a, b, relu)
        tail = TailRecord(a.detach(), len(tokens))
        for index, (record, token) in enumerate(zip(self._records, self._tokens, strict=True)):
            if token is not None:
                record.readers.append((tail, index))
        return Tail.apply(a, b, tail, relu, list(self._maps), *tokens)
