"""Brings tables and pictures into step with bench/results/: `python3 dev.py report [--check]`.

A document (README.md, docs/*.md) says where a table goes; everything between the two lines is written by this command:

    <!-- table NAME -->
    <!-- end of NAME -->

Tables are made by the functions in the dictionaries TABLES of `*_tables.py`, each from the newest rows of all records.
Speeds of a record in which a correctness check failed are not reported. What no record of a GPU has is listed as "not
yet measured on a GPU". `--check` writes nothing and fails where something is out of step (pictures, which differ from
one version of matplotlib to the next, need only be there).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import er_tables
import headline_tables
import macenko_tables
import model_tables
import pictures
import record_tables
import target_tables
from record import ROOT
from records import Records

TABLES: dict[str, Callable[[Records], str]] = {
    **target_tables.TABLES, **record_tables.TABLES, **er_tables.TABLES, **macenko_tables.TABLES,
    **model_tables.TABLES, **headline_tables.TABLES,
}  # fmt: skip
_BLOCK = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end of \2 -->)", re.S)


def filled(text: str, tables: Mapping[str, str], where: str) -> str:
    def replace(match: re.Match[str]) -> str:
        if match[2] not in tables:
            raise ValueError(f"{where} wants a table {match[2]!r}; there are {', '.join(sorted(tables))}.")
        return f"{match[1]}\n{tables[match[2]].strip()}\n\n{match[3]}"

    begun, whole = len(re.findall(r"<!-- table [\w-]+ -->", text)), len(_BLOCK.findall(text))
    if begun != whole:
        raise ValueError(f'{where}: {begun} tables begin and {whole} have their line "<!-- end of NAME -->".')
    return _BLOCK.sub(replace, text)


def update(root: Path, records: Records, check: bool) -> list[Path]:
    """Write the documents, or with `check` only compare; returns those that were out of step."""
    tables = {name: table(records) for name, table in TABLES.items()}
    below = {name: text.replace("](bench/", "](../bench/") for name, text in tables.items()}
    stale = []
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        before = path.read_text()
        after = filled(before, tables if path.parent == root else below, path.name)
        if after != before:
            stale.append(path)
            if not check:
                path.write_text(after)
    return stale


def update_pictures(folder: Path, records: Records, check: bool) -> list[Path]:
    """Draw the pictures, or with `check` only look whether they are there; returns those that changed or lack."""
    if check:
        return pictures.missing(records, folder)
    return pictures.draw(records, folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if --check finds something out of step."""
    parser = argparse.ArgumentParser(prog="dev.py report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a document is out of step")
    check = parser.parse_args(arguments).check
    records = Records()
    stale = [*update_pictures(ROOT / "docs", records, check), *update(ROOT, records, check)]
    names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
    if check and stale:
        print(f"out of step with bench/results/: {names}. Run: python3 dev.py report", file=sys.stderr)
        return 1
    print(f"written: {names}" if names else "everything is in step with bench/results/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
