"""Bars, drawn by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from automodel_fn.errors import BackendUnavailableError

_COLORS = ("#1b9e5a", "#3b7dd8", "#d98a1f", "#8a5fbf", "#c2474f", "#5d7380", "#a0a832")
_OTHERS = "#999999"


@attrs.frozen
class Panel:
    """One measure, drawn as a panel of groups of bars.

    Args:
        title: What is drawn, with its unit.
        groups: For each group (a case) the length of each of its bars (a subject).
    """

    title: str
    groups: Mapping[str, Mapping[str, float]] = attrs.field(kw_only=True)


def bars_svg(panels: Sequence[Panel]) -> str:
    """Panels side by side, of groups of horizontal bars, as SVG text.

    A subject has one colour in all of them, and each bar says its length.

    Args:
        panels: What is drawn; they share the groups.

    Raises:
        BackendUnavailableError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailableError(
            "bars need matplotlib, which is not installed; "
            "install it with pip install 'automodel_fn[plots]'."
        ) from error
    groups = list(dict.fromkeys(group for panel in panels for group in panel.groups))
    names = _names(panels)
    num_bars = {
        group: [n for n in names if any(n in panel.groups.get(group, {}) for panel in panels)]
        for group in groups
    }
    height = 1.2 + 0.21 * sum(len(bars) + 1 for bars in num_bars.values())
    with rc_context({"svg.hashsalt": "automodel_fn", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(3.2 + 4.2 * len(panels), height), layout="constrained")
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, panel in zip(row, panels, strict=True):
            _draw(axes, panel, num_bars, names)
        handles = [_patch(names[name], name) for name in names]
        figure.legend(handles=handles, loc="outside upper center", ncols=7, frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _names(panels: Sequence[Panel]) -> dict[str, str]:
    """The colour of each bar's name."""
    found = dict.fromkeys(
        name for panel in panels for bars in panel.groups.values() for name in bars
    )
    colors = [*_COLORS, *[_OTHERS] * len(found)]
    return dict(zip(found, colors, strict=False))


def _draw(
    axes: Any, panel: Panel, rows: Mapping[str, Sequence[str]], colors: Mapping[str, str]
) -> None:
    place, centers = 0.0, []
    for group, names in rows.items():
        start = place
        for name in names:
            value = panel.groups.get(group, {}).get(name)
            if value is not None:
                axes.barh(place, value, height=0.86, color=colors[name])
                axes.text(value, place, f" {value:,.1f}", va="center", ha="left", fontsize=7)
            place += 1
        centers.append((start + place - 1) / 2)
        place += 1
    axes.set_yticks(centers, list(rows))
    axes.set_ylim(place - 1, -1)
    axes.set_title(panel.title, fontsize=9)
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _patch(color: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=color, label=label)
