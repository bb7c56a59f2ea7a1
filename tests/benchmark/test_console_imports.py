"""ernet_fast.console serves cli, train, benchmark and demo, and imports none of them."""

from __future__ import annotations

import ast
from pathlib import Path

import ernet_fast

FOLDER = Path(ernet_fast.__file__).parent


def imported(path):
    """The modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_console_imports_nothing_of_the_package_but_itself():
    files = sorted((FOLDER / "console").glob("*.py"))
    assert len(files) >= 4
    found = {name for path in files for name in imported(path) if name.startswith("ernet_fast")}
    assert {name for name in found if not name.startswith("ernet_fast.console")} == set()


def test_reporters_and_tables_come_from_console():
    for part in ("cli", "benchmark", "demo", "train"):
        for path in (FOLDER / part).glob("*.py"):
            if path.name == "__init__.py":
                continue
            wrong = [name for name in imported(path) if name.startswith("ernet_fast.train") and "Reporter" in name]
            assert not wrong, f"{path.name} imports {wrong}"


def test_modules_that_benches_load_by_file_import_nothing_of_the_package():
    for name in ("benchmark/interleaved.py", "benchmark/macenko_peers.py", "processor.py"):
        assert not [one for one in imported(FOLDER / name) if one.startswith("ernet_fast")]
