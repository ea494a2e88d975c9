"""One self-contained HTML page from sections: no script, no font, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d8dee6; --paper: #fff;
  --keep: #1b9e5a; --cast: #3b7dd8; --skip: #aab4c0; --bad: #c43d3d;
  --tint: #f4f6f9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa5b4; --line: #333c48;
  --paper: #14181e; --skip: #586373;
  --tint: #1b2129; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 2rem 1.5rem 4rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p.lead { color: var(--soft); margin: 0 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; width: 100%; }
th { text-align: left; font-weight: 600; color: var(--soft); }
th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code, td.c { font-family: ui-monospace, monospace; font-size: .82rem; word-break: break-word; }
td.c { min-width: 22rem; }
.dot { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px;
  margin-right: .4rem; }
.keep { background: var(--keep); } .cast { background: var(--cast); }
.skip { background: var(--skip); }
.bar { display: flex; height: 1.3rem; border-radius: 3px; overflow: hidden;
  background: var(--tint); }
.bar i { display: block; min-width: 2px; }
table.map { width: auto; border-spacing: 2px; border-collapse: separate; }
table.map td { padding: 0; border: 0; } table.map th { border: 0; padding: 0 .6rem 0 0; }
table.map thead th { font-weight: 400; padding: 0; text-align: center; font-size: .72rem; }
table.map td.cell { width: 1.15rem; min-width: 1.15rem; height: 1.15rem; border-radius: 2px; }
.ok { color: var(--keep); }
.failed { color: var(--bad); font-weight: 600; } .open { color: var(--soft); }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 4px; }
figure svg { width: 100%; height: auto; display: block; }
ul { padding-left: 1.1rem; }
"""


def page(title: str, lead: str, sections: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: The heading, as text.
        lead: One line beneath it, as text.
        sections: HTML, as the functions of this area make it.

    Example:
        >>> page("Run", "of today", []).splitlines()[0]
        '<!doctype html>'
    """
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>"
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>\n{body}\n</body></html>\n'
    )


def section(title: str, html: str) -> str:
    """A section of a page: a heading as text, a body as HTML."""
    return f"<section><h2>{escape(title)}</h2>{html}</section>"


def text_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of text as an HTML table.

    Example:
        >>> "<tr><td>&lt;b&gt;</td></tr>" in text_table(["a"], [["<b>"]])
        True
    """
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def bullet_list(items: Iterable[str]) -> str:
    """Texts as an HTML list."""
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
