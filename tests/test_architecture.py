"""The imports of the package are those that docs/architecture.md draws; pages name only files that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ernet_fast"
PAGE = ROOT / "docs" / "architecture.md"
MOST_ER_MODULES = 18
UNDRAWN = {"base"}
"""What every module may import."""


def modules() -> dict[str, Path]:
    """Every module without the package's name; a package's own is `name.__init__`."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        found[".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts)] = path
    return found


MODULES = modules()


def _module(name: str) -> str | None:
    """The module that the dotted `name`, package included, stands for; None if it is none of ours."""
    if name != PACKAGE and not name.startswith(PACKAGE + "."):
        return None
    own = name[len(PACKAGE) + 1 :]
    for candidate in (own, f"{own}.__init__".lstrip(".")):
        if candidate in MODULES:
            return candidate
    return None


def imports_of(source: str, module: str) -> Iterator[tuple[str, int]]:
    """(module, line) of every import of our modules in `source`, wherever it stands."""
    parts = [PACKAGE, *module.split(".")]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*parts[: -node.level], *filter(None, [node.module])]) if node.level else node.module or ""
            names = []
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                names.append(inner if _module(inner) else base)
        else:
            continue
        for name in names:
            target = _module(name)
            if target is not None and target != module:
                yield target, node.lineno


def all_imports() -> dict[str, dict[str, int]]:
    """Module -> the modules that it imports, each with a line."""
    return {module: dict(imports_of(path.read_text(), module)) for module, path in MODULES.items()}


IMPORTS = all_imports()


def layers() -> list[tuple[str, list[str]]]:
    """(node, prefixes of modules) of every row of the page's table of layers, from the top."""
    section = PAGE.read_text().split("## Layers", 1)[1].split("\n## ", 1)[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    return [(node.strip(" `"), re.findall(r"`([^`]+)`", names)) for node, names in rows]


LAYERS = layers()


def place_of(module: str) -> tuple[int, str]:
    """The number of the module's layer, counted from the top, and its node: those of the longest prefix."""
    fits = [
        (len(prefix), number, node)
        for number, (node, prefixes) in enumerate(LAYERS)
        for prefix in prefixes
        if module == prefix or module.startswith(prefix + ".")
    ]
    assert fits, f"{module} has no layer: add it to the table of docs/architecture.md"
    _, number, node = max(fits)
    return number, node


def drawn(title: str) -> set[tuple[str, str]]:
    """The edges of the page's graph `title`."""
    graph = re.search(rf"```mermaid\n%% {re.escape(title)}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert graph, f"docs/architecture.md has no graph '%% {title}'"
    edges = set()
    for line in graph[1].splitlines():
        if "-->" in line:
            source, targets = line.split("-->")
            edges |= {(source.strip(), target.strip()) for target in targets.split("&")}
    return edges


def check_graph(title: str, found: set[tuple[str, str]]) -> None:
    edges = drawn(title)
    lines = [f"to add:    {source} --> {target}" for source, target in sorted(found - edges)]
    lines += [f"to remove: {source} --> {target}" for source, target in sorted(edges - found)]
    assert not lines, f"the graph '%% {title}' of docs/architecture.md:\n" + "\n".join(lines)


def test_no_import_goes_up():
    wrong = []
    for module, targets in IMPORTS.items():
        for target, line in targets.items():
            if place_of(target)[0] < place_of(module)[0]:
                wrong.append(f"{MODULES[module].relative_to(ROOT)}:{line} imports {target}, of a higher layer")
    assert not wrong, "\n".join(wrong)


def circle(imports: dict[str, dict[str, int]]) -> list[str] | None:
    """Modules that import each other in a circle; None if there are none."""
    done: set[str] = set()
    way: list[str] = []

    def visit(module: str) -> list[str] | None:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return None
        way.append(module)
        for target in imports[module]:
            found = visit(target)
            if found:
                return found
        done.add(way.pop())
        return None

    return next(filter(None, map(visit, imports)), None)


def test_no_circle():
    found = circle(IMPORTS)
    assert found is None, " -> ".join(found)


def test_the_graph_of_packages_is_the_code():
    found = set()
    for module, targets in IMPORTS.items():
        for target in targets:
            edge = place_of(module)[1], place_of(target)[1]
            if edge[0] != edge[1] and edge[1] not in UNDRAWN:
                found.add(edge)
    check_graph("packages", found)


def test_the_graph_of_er_is_the_code():
    def name(module: str) -> str | None:
        node = place_of(module)[1]
        return "triton" if node == "er.triton" else module.removeprefix("er.") if node == "er" else None

    found = {(name(module), name(target)) for module, targets in IMPORTS.items() for target in targets}
    check_graph("er", {(source, target) for source, target in found if source and target and source != target})


def test_er_stays_small():
    own = [module for module in MODULES if module.startswith("er.") and not module.startswith("er.triton.")]
    assert len(own) <= MOST_ER_MODULES, f"er/ has {len(own)} modules: {', '.join(own)}"


def test_every_row_of_the_layers_names_modules_that_exist():
    prefixes = [prefix for _, names in LAYERS for prefix in names]
    assert len(prefixes) == len(set(prefixes))
    for prefix in prefixes:
        assert any(module == prefix or module.startswith(prefix + ".") for module in MODULES), prefix


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_PATH = re.compile(r"`((?:\.ci|csrc|ernet_fast|tests|bench|docs)/[\w./*{},-]+)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_exists(page):
    missing = []
    for path in _PATH.findall(page.read_text()):
        braces = re.search(r"\{(.*)\}", path)
        for choice in braces[1].split(",") if braces else [""]:
            one = path.replace(braces[0], choice) if braces else path
            if not any(ROOT.glob(one.rstrip("/."))):
                missing.append(one)
    assert not missing, f"{page.name} names {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"{page.name} links to {', '.join(missing)}"


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title).lower()).replace(" ", "-") for title in titles
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_heading_leads_to_one(page):
    links = re.findall(r"\]\(([^)#:\s]*)#([^)]*)\)", page.read_text())
    targets = [(page.parent / link if link else page, anchor) for link, anchor in links]
    missing = [f"{to.name}#{anchor}" for to, anchor in targets if to.suffix == ".md" and anchor not in headings(to)]
    assert not missing, f"{page.name} links to {', '.join(missing)}"


def test_imports_are_found_wherever_they_stand():
    source = """
from typing import TYPE_CHECKING
import ernet_fast.er.plain
if TYPE_CHECKING:
    from ernet_fast.er import operators, stage
def f():
    from .reference import er
    from ernet_fast import er_shortcut_sum
"""
    found = {name for name, _ in imports_of(source, "diagnosis")}
    assert found == {"er.plain", "er.operators", "er.stage", "reference.er", "__init__"}


def test_a_circle_is_found():
    assert circle({"a": {"b": 1}, "b": {"c": 1}, "c": {"b": 1}}) == ["b", "c", "b"]
    assert circle({"a": {"b": 1, "c": 1}, "b": {"c": 1}, "c": {}}) is None
