"""Nuclei of H&E images: a band-pass of the haematoxylin in the frequency domain, then a watershed.

Needs the extra `segment`: ``pip install 'ernet_fast[segment]'``.
"""

from __future__ import annotations

from ernet_fast.segment.agreement import Detection, compare_nuclei
from ernet_fast.segment.band_pass import band_pass
from ernet_fast.segment.files import FileNuclei, segment_files
from ernet_fast.segment.nuclei import SegmentedNuclei, nuclei
from ernet_fast.segment.overlay import draw_outlines
from ernet_fast.segment.settings import NucleiSettings

__all__ = [
    "Detection", "FileNuclei", "NucleiSettings", "SegmentedNuclei", "band_pass", "compare_nuclei", "draw_outlines",
    "nuclei", "segment_files",
]  # fmt: skip
