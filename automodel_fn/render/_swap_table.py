"""A backend plan as a table for a terminal."""

from __future__ import annotations

from collections import Counter

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from automodel_fn.plans import Plan
from automodel_fn.render._groups import grouped

_STYLES = {"swap": "cyan", "keep": "", "skip": "yellow"}
_ORDER = ("swap", "skip", "keep")


def swap_table(plan: Plan, title: str = "Backend plan") -> Table:
    """A backend plan as a table: what is swapped first, then what could not be, then the rest.

    Modules that are alike but for layer numbers share a row. Draw it with rich's `print`.

    Args:
        plan: A backend plan.
        title: The heading.

    Example:
        >>> from torch import nn
        >>> from automodel_fn import BackendConfig, backend_plan
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        >>> swap_table(backend_plan(model, BackendConfig(linear="torch"))).row_count
        1
    """
    rows = plan.rows()
    counts = Counter(row.action for row in rows)
    said = ", ".join(f"{counts[action]} {action}" for action in _ORDER if counts[action])
    table = Table(title=title, caption=said or "nothing", box=SIMPLE_HEAD, title_justify="left")
    table.caption_justify = "left"
    table.add_column("modules", overflow="fold", ratio=4)
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("class", overflow="fold", ratio=2)
    table.add_column("backend", overflow="fold", ratio=3)
    table.add_column("why", overflow="fold", ratio=4)
    for group in sorted(grouped(rows), key=lambda group: _ORDER.index(group.first.action)):
        row = group.first
        more = f" (+{row.num_aliases})" if row.num_aliases else ""
        change = row.before if row.before == row.after else f"{row.before} -> {_word(row.after)}"
        texts = (group.pattern + more, str(group.count), row.shape, change, row.reason)
        table.add_row(*map(Text, texts), style=_STYLES[row.action])
    return table


def _word(text: str) -> str:
    return text.partition("=")[2]
