"""One HTML file that needs nothing else: pictures embedded, no script, no font or address from elsewhere.

A report is a list of blocks; each function here makes one, escaping all text it is given.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ernet_fast.console.atomic_file import write_text

Block = str
"""A piece of finished HTML."""

_STYLE = """
:root { color-scheme: light; --ink: #1f2933; --muted: #5f6c7b; --line: #e4e7eb; --soft: #f5f7fa; --accent: #2563a8; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--soft); color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", "Helvetica Neue",
  Arial, "DejaVu Sans", sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 36px 40px 28px; background: #fff; min-height: 100vh;
  border: solid var(--line); border-width: 0 1px; }
header { border-bottom: 3px solid var(--accent); padding-bottom: 14px; margin-bottom: 22px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
header p { margin: 0; color: var(--muted); }
h2 { font-size: 18px; margin: 34px 0 10px; padding-bottom: 5px; border-bottom: 1px solid var(--line); }
p { margin: 0 0 12px; max-width: 92ch; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(114px, 1fr)); gap: 8px;
  margin: 0 0 18px; padding: 0; }
.cards div { border: 1px solid var(--line); border-radius: 8px; padding: 10px 11px 8px; }
.cards dt { color: var(--muted); font-size: 12.5px; }
.cards dd { margin: 2px 0 0; font-size: 23px; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.25; }
.cards small { display: block; color: var(--muted); font-size: 12px; font-weight: 400; }
.note { border-left: 4px solid #c2571a; background: #fdf5ef; padding: 10px 14px; margin: 0 0 16px;
  border-radius: 0 6px 6px 0; }
.note p { margin: 0; max-width: none; }
.scroll { overflow-x: auto; margin: 0 0 16px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); font-size: 13px; padding-bottom: 6px; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child, table.text th, table.text td { text-align: left; }
thead th { color: var(--muted); font-weight: 600; font-size: 12.5px; border-bottom-color: #cbd2d9; }
tbody th { font-weight: 500; }
table.text th { white-space: nowrap; }
table.text td { overflow-wrap: anywhere; }
tbody tr:first-child.strong th, tbody tr:first-child.strong td { font-weight: 600; background: var(--soft); }
.pictures { display: flex; flex-wrap: wrap; gap: 18px; align-items: flex-start; margin: 0 0 14px; }
figure { margin: 0; flex: 1 1 300px; min-width: 0; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { color: var(--muted); font-size: 13px; margin-top: 5px; }
.bars { display: grid; grid-template-columns: auto 1fr auto; gap: 5px 12px; align-items: center; margin: 0 0 16px;
  font-size: 14px; }
.bars .track { height: 15px; }
.bars .bar { height: 15px; border-radius: 3px; background: #cbd2d9; min-width: 2px; }
.bars .bar.own { background: var(--accent); }
.bars .title { grid-column: 1 / -1; font-weight: 600; margin-top: 8px; }
.bars .value { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; background: var(--soft);
  padding: 1px 5px; border-radius: 4px; overflow-wrap: anywhere; }
footer { margin-top: 34px; padding-top: 12px; border-top: 1px solid var(--line); color: var(--muted); font-size: 13px; }
@media (max-width: 640px) { main { padding: 20px 14px; border: 0; } h1 { font-size: 22px; }
  table.text tr, table.text th, table.text td { display: block; white-space: normal; }
  table.text th { border-bottom: 0; padding-bottom: 0; } .pictures figure { flex-basis: 100%; } }
@media print { body { background: #fff; } main { border: 0; padding: 0; max-width: none; }
  h2, figure, table { break-inside: avoid; } }
"""


def paragraph(text: str) -> Block:
    """Running text."""
    return f"<p>{escape(text)}</p>"


def command(text: str) -> Block:
    """A command line."""
    return f"<p><code>{escape(text)}</code></p>"


def note(text: str) -> Block:
    """A caution that must not be overlooked."""
    return f'<div class="note" role="note"><p>{escape(text)}</p></div>'


def cards(figures: Sequence[tuple[str, str, str]]) -> Block:
    """Large figures: (name, value, explanation)."""
    card = "<div><dt>{}</dt><dd>{}<small>{}</small></dd></div>"
    return f'<dl class="cards">{"".join(card.format(*map(escape, texts)) for texts in figures)}</dl>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "", kind: str = "figures") -> Block:
    """A table whose first column names the rows.

    `kind`: ``"figures"`` aligns numbers to the right, ``"total"`` also stresses the first row, ``"text"``
    aligns everything to the left.
    """
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    strong = ' class="strong"' if kind == "total" else ""
    body = ""
    for row in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        body += f'<tr{strong}><th scope="row">{escape(row[0])}</th>{cells}</tr>'
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    top = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    return f'<div class="scroll"><table class="{escape(kind)}">{title}{top}<tbody>{body}</tbody></table></div>'


def pictures(items: Sequence[tuple[bytes, str, str]]) -> Block:
    """PNG pictures side by side: (file, description for those who do not see it, caption)."""
    figures = []
    for png, description, caption in items:
        data = base64.b64encode(png).decode("ascii")
        label = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        figures.append(f'<figure><img alt="{escape(description)}" src="data:image/png;base64,{data}">{label}</figure>')
    return f'<div class="pictures">{"".join(figures)}</div>'


def bars(groups: Sequence[tuple[str, Sequence[tuple[str, float, str]]]]) -> Block:
    """Bar charts: (title, [(name, length, value as text), ...]); the first bar of a group is this library's own."""
    parts = []
    for title, entries in groups:
        longest = max(length for _, length, _ in entries)
        parts.append(f'<div class="title">{escape(title)}</div>')
        for index, (name, length, value) in enumerate(entries):
            kind, width = "bar" if index else "bar own", 100 * length / longest
            bar = f'<div class="track"><div class="{kind}" style="width:{width:.1f}%"></div></div>'
            parts.append(f'<div>{escape(name)}</div>{bar}<div class="value">{escape(value)}</div>')
    return f'<div class="bars">{"".join(parts)}</div>'


def section(title: str, *blocks: Block) -> Block:
    """A part with a heading."""
    return f"<section><h2>{escape(title)}</h2>{''.join(blocks)}</section>"


def write_report(
    path: str | os.PathLike[str], *, title: str, subtitle: str, blocks: Sequence[Block], footer: str = ""
) -> Path:
    """Write the page of `blocks` atomically, with heading, subtitle and footer of a line each; returns its path."""
    ending = f"<footer>{escape(footer)}</footer>" if footer else ""
    content = "\n".join(blocks)
    page = f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>
{content}
{ending}
</main>
</body>
</html>
"""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path
