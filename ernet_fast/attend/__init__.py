"""Attention over the fields of a slide or patient, at all magnifications together. Needs the extra `train`."""

from __future__ import annotations

from ernet_fast.attend.bags import Bag, make_bags
from ernet_fast.attend.result import AttendResult
from ernet_fast.attend.run import attend
from ernet_fast.attend.settings import AttendSettings

__all__ = ["AttendResult", "AttendSettings", "Bag", "attend", "make_bags"]
