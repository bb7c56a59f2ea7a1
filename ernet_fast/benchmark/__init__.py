"""``ernet-fast bench``: the library on the machine at hand, against what else is installed there."""

from __future__ import annotations

from ernet_fast.benchmark.question import Agreement, Answer, Contestant, Question
from ernet_fast.benchmark.run import BenchmarkConfig, run_benchmark

__all__ = ["Agreement", "Answer", "BenchmarkConfig", "Contestant", "Question", "run_benchmark"]
