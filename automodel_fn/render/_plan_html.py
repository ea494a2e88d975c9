"""A plan as HTML: a bar of its bytes, a map of its tensors, a table of its decisions."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from html import escape

from automodel_fn.plans import Plan, Row
from automodel_fn.render._groups import grouped, name_pattern, size_text, summary
from automodel_fn.render._page import bullet_list, page, section
from automodel_fn.render._table import short_change

_LEGEND = (("keep", "kept in float32"), ("cast", "cast"), ("skip", "left alone"))
_LAYER = re.compile(r"^(.*?)(?<![^.])(\d+)(?![^.])(.*)$")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_MAX_COLUMNS = 160


def plan_html(plan: Plan, title: str = "Cast plan") -> str:
    """A plan as one self-contained page.

    Example:
        >>> import torch
        >>> from automodel_fn import bf16, cast_plan
        >>> "0.0 KiB" in plan_html(cast_plan(torch.nn.Linear(2, 2), bf16))
        False
    """
    return page(title, summary(plan.rows()), plan_sections(plan))


def plan_sections(plan: Plan) -> tuple[str, ...]:
    """The sections that show a plan, to put into a page."""
    rows = plan.rows()
    picture = _legend() + _bar(rows) + _map(rows)
    notes = section("Notes on the plan", bullet_list(plan.notes)) if plan.notes else ""
    decisions = section("Decisions", _decisions(rows))
    return section("The plan in one picture", picture), notes, decisions


def _legend() -> str:
    items = " &nbsp; ".join(
        f'<span class="dot {action}"></span>{meaning}' for action, meaning in _LEGEND
    )
    return f"<p>{items}</p>"


def _bar(rows: Sequence[Row]) -> str:
    """Two bars of bytes, before and after, to one scale."""
    total = max(1, *(sum(getattr(row, side) for row in rows) for side in _SIDES))
    return "".join(_one_bar(rows, side, label, total) for side, label in _SIDES.items())


_SIDES = {"bytes_before": "before", "bytes_after": "after"}


def _one_bar(rows: Sequence[Row], side: str, label: str, total: int) -> str:
    parts = {
        action: sum(getattr(row, side) for row in rows if row.action == action)
        for action, _ in _LEGEND
    }
    pieces = "".join(
        f'<i class="{action}" style="width:{100 * size / total:.3f}%" '
        f'title="{meaning}: {size_text(size)}"></i>'
        for action, meaning in _LEGEND
        if (size := parts[action])
    )
    return f'<p>{label}: {size_text(sum(parts.values()))}</p><div class="bar">{pieces}</div>'


def _map(rows: Sequence[Row]) -> str:
    """Kinds of tensors down, layers across; one cell a kind and layer, whatever its size."""
    cells: defaultdict[str, defaultdict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found = _LAYER.match(row.name)
        kind = f"{found[1]}*{_NUMBER.sub('#', found[3])}" if found else row.name
        cells[kind][int(found[2]) if found else -1].append(row)
    numbers = sorted({layer for kind in cells.values() for layer in kind})
    layers = numbers[:_MAX_COLUMNS]
    rest = numbers[_MAX_COLUMNS:]
    cut = f"<p>Layers {rest[0]} to {rest[-1]}: in the table only.</p>" if rest else ""
    head = "".join(f"<th>{layer if layer >= 0 else ''}</th>" for layer in layers)
    body = "".join(
        f"<tr><th><code>{escape(kind)}</code></th>"
        + "".join(_cell(by_layer.get(layer, ())) for layer in layers)
        + "</tr>"
        for kind, by_layer in cells.items()
    )
    return (
        f'<div class="scroll"><table class="map"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{cut}"
    )


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return "<td></td>"
    first = rows[0]
    names = name_pattern([row.name for row in rows])
    text = f"{names}\n{short_change(first.before, first.after)}, {first.shape}\n{first.reason}"
    actions = {row.action for row in rows}
    action = next((action for action, _ in _LEGEND if action in actions), "skip")
    return f'<td class="cell {action}" title="{escape(text)}"></td>'


def _decisions(rows: Sequence[Row]) -> str:
    lines = "".join(
        f'<tr><td class="c"><span class="dot {escape(row.action)}"></span>'
        f"{escape(group.pattern)}{f' (+{row.num_aliases} alias)' if row.num_aliases else ''}</td>"
        f'<td class="n">{group.count}</td><td class="n">{escape(row.shape)}</td>'
        f'<td class="n">{escape(short_change(row.before, row.after))}</td>'
        f'<td class="n">{size_text(group.bytes_before - group.bytes_after)}</td>'
        f"<td>{escape(row.reason)}</td></tr>"
        for group in grouped(rows)
        for row in (group.first,)
    )
    headings = ("tensors", "n", "shape", "dtype", "saved", "why")
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )
