"""Imports and pickles that name a module by an earlier path: found at the new path, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

MOVED = {
    "ernet_fast.cli.json_output": "ernet_fast.cli.streams",
    "ernet_fast.cli.normalize_batches": "ernet_fast.scale.batches",
    "ernet_fast.cli.normalize_files": "ernet_fast.scale.pipeline",
    "ernet_fast.cli.normalize_plan": "ernet_fast.scale.inputs",
    "ernet_fast.cli.normalize_record": "ernet_fast.scale.run_folder",
    "ernet_fast.er.batch_norm_relu": "ernet_fast.er.norm_relu",
    "ernet_fast.er.folded": "ernet_fast.er.shortcut",
    "ernet_fast.er.kept_memory": "ernet_fast.output_cache",
    "ernet_fast.models.checkpointing": "ernet_fast.models.stage",
    "ernet_fast.models.feature_levels": "ernet_fast.models.resnet",
    "ernet_fast.models.network_states": "ernet_fast.models.weights",
    "ernet_fast.models.plain_forward": "ernet_fast.models.plain_resnet",
    "ernet_fast.models.table": "ernet_fast.models.flops",
    "ernet_fast.stain.parameters": "ernet_fast.stain.options",
    "ernet_fast.stain.published": "ernet_fast.stain.result",
    "ernet_fast.train.atomic_file": "ernet_fast.console.atomic_file",
    "ernet_fast.train.history": "ernet_fast.train.describe",
    "ernet_fast.train.progress": "ernet_fast.console.progress",
    "ernet_fast.train.resume": "ernet_fast.train.config",
    "ernet_fast.train.schedule": "ernet_fast.train.network",
    "ernet_fast.train.selection": "ernet_fast.train.images",
    "ernet_fast.train.tables": "ernet_fast.console.tables",
}
"""Old path -> new path. An entry is removed in the second minor version after the one that added it."""


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    _spec: importlib.machinery.ModuleSpec | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = MOVED[spec.name]
        # the frames between are importlib's; the warning names the line that imports
        warnings.warn(f"{spec.name} has moved to {new}.", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module, which was executed under its new path, the specification back that importlib replaced."""
        module.__spec__ = self._spec


def install() -> None:
    """Let imports of moved modules succeed; a second call does nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
