"""Stain normalisation of archives: files and folders of any number, many at a time, resumable."""

from __future__ import annotations

from ernet_fast.scale.files import normalize_files, normalize_slide
from ernet_fast.scale.ray_data import normalize_dataset
from ernet_fast.scale.shard import Shard, merge_status
from ernet_fast.scale.slides import SlideForm
from ernet_fast.scale.status import FileStatus, Summary, write_status
from ernet_fast.scale.table_files import TableStatus, write_tables
from ernet_fast.scale.treat import Limits

__all__ = [
    "FileStatus", "Limits", "Shard", "SlideForm", "Summary", "TableStatus", "merge_status", "normalize_dataset",
    "normalize_files", "normalize_slide", "write_status", "write_tables",
]  # fmt: skip
