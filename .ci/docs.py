"""`python3 dev.py docs`: docs/, the README and an API reference from docstrings as a site in build/site.

Pages are put together in build/docs, with links that hold there; mkdocs fails on a link that leads nowhere. What is
linked outside the pages, as records of benches, is copied beside them. Runs in the environment of
requirements-release.txt.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "docs"
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
"""Pages beside docs/, and their names on the site."""
API = ("ernet_fast", "ernet_fast.stain", "ernet_fast.models", "ernet_fast.er", "ernet_fast.data", "ernet_fast.train")
"""Packages whose public names the reference describes."""
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def place(path: Path) -> Path | None:
    """Where a file of the repository is on the site, relative to its root; None for folders, which have no page."""
    name = path.relative_to(ROOT).as_posix()
    if not path.is_file():
        return None
    return Path(PAGES.get(name, name.removeprefix("docs/")))


def with_links(text: str, page: Path) -> str:
    """The text of a page of the repository with links that hold on the site; copies what they lead to."""
    here = place(page)
    assert here is not None

    def replace(match: re.Match[str]) -> str:
        target = (page.parent / match[3]).resolve()
        there = place(target)
        if there is None:
            return f"{match[2]}"
        if target.suffix != ".md":
            (OUT / there).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, OUT / there)
        return f"{match[1]}[{match[2]}]({os.path.relpath(there, here.parent)}{match[4] or ''})"

    return LINK.sub(replace, text)


def public_names(package: str) -> list[str]:
    """The names in `__all__` of a package, read without importing it."""
    source = (ROOT / package.replace(".", "/") / "__init__.py").read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return [name for name in ast.literal_eval(node.value) if not name.startswith("__")]
    return []


def reference() -> str:
    """The page of the API: what mkdocstrings is to fill in, name by name; each name once."""
    lines, seen = ["# API reference", ""], set()
    for package in API:
        names = [name for name in public_names(package) if name not in seen]
        if names:
            lines += [f"## `{package}`", ""]
            lines += [line for name in names for line in (f"::: {package}.{name}", "")]
        seen |= set(names)
    return "\n".join(lines)


def put_together() -> None:
    """Write all pages to build/docs."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    for page in (*sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in PAGES)):
        there = place(page)
        assert there is not None
        (OUT / there).write_text(with_links(page.read_text(), page))
    (OUT / "api.md").write_text(reference())


def main(arguments: Sequence[str]) -> int:
    """Build the site, or serve it; returns mkdocs' exit code."""
    parser = argparse.ArgumentParser(prog="dev.py docs", description=__doc__.split("\n\n")[0])
    parser.add_argument("--serve", action="store_true", help="show the site at http://127.0.0.1:8000")
    options = parser.parse_args(arguments)
    put_together()
    command = ["serve"] if options.serve else ["build", "--strict", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    code = subprocess.run([sys.executable, "-m", "mkdocs", *command], cwd=ROOT, env=environment, check=False).returncode
    if code == 0 and not options.serve:
        print(f"written: {ROOT / 'build' / 'site' / 'index.html'}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
