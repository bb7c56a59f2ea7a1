"""A tour of the library on a small set of images, ending in a report."""

from __future__ import annotations

from ernet_fast.demo.run import DemoConfig, DemoResult, run_demo

__all__ = ["DemoConfig", "DemoResult", "run_demo"]
