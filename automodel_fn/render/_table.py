"""Plans and other rows as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from automodel_fn.plans import Plan
from automodel_fn.render._groups import Group, grouped, size_text, summary

_STYLES = {"keep": "bold green", "cast": "cyan", "skip": "dim"}
_ORDER = ("keep", "cast", "skip")


def plan_table(plan: Plan, title: str = "Cast plan") -> Table:
    """A plan as a table: fp32 pins first, each with the rule that pinned it.

    Tensors that are alike but for layer numbers share a row. Draw it with rich's `print`.

    Args:
        plan: Any plan.
        title: The heading.

    Example:
        >>> import torch
        >>> from automodel_fn import bf16, cast_plan
        >>> plan_table(cast_plan(torch.nn.Linear(2, 2), bf16)).row_count
        2
    """
    rows = plan.rows()
    table = Table(title=title, caption=summary(rows), box=SIMPLE_HEAD, title_justify="left")
    table.caption_justify = "left"
    table.add_column("tensors", overflow="fold", ratio=5)
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    table.add_column("saved", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold", ratio=4)
    for group in sorted(grouped(rows), key=_rank):
        table.add_row(*_cells(group), style=_STYLES.get(group.first.action, ""))
    return table


def _rank(group: Group) -> int:
    action = group.first.action
    return _ORDER.index(action) if action in _ORDER else len(_ORDER)


def _cells(group: Group) -> tuple[Text, ...]:
    row = group.first
    aliases = f" (+{row.num_aliases} alias)" if row.num_aliases else ""
    saved = group.bytes_before - group.bytes_after
    texts = (
        group.pattern + aliases,
        str(group.count),
        short_change(row.before, row.after),
        size_text(saved) if saved else "-",
        row.reason,
    )
    return tuple(Text(text) for text in texts)


def short_change(before: str, after: str) -> str:
    """What a dtype becomes, in short names.

    Example:
        >>> short_change("float32", "bfloat16"), short_change("float32", "float32")
        ('fp32 -> bf16', 'fp32')
    """
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    left, right = short.get(before, before), short.get(after, after)
    return left if left == right else f"{left} -> {right}"


def simple_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Any rows of text as a table; what looks like markup is shown as it is."""
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
