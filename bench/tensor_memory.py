"""Memory that tensors take during a call, measured as `ernet-fast bench model` of this tree does."""

from __future__ import annotations

from this_tree import module

_measure = module("benchmark/tensor_memory")
MemoryUse, memory_use, no_kept_memory = _measure.MemoryUse, _measure.memory_use, _measure.no_kept_memory
held_bytes, training_peak, activation_peak = _measure.held_bytes, _measure.training_peak, _measure.activation_peak
