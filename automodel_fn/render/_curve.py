"""Curves, drawn by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence

from automodel_fn.errors import BackendUnavailableError


def curve_svg(
    values: Sequence[float], *, x_label: str, y_label: str, marks: Sequence[tuple[int, float]] = ()
) -> str:
    """A line over 1, 2, 3, ... as SVG text that can stand in an HTML page.

    Args:
        values: The heights, one a step.
        x_label: What a step is.
        y_label: What a height is, with its unit.
        marks: Single points (step, height) to mark as well.

    Raises:
        BackendUnavailableError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailableError(
            "a curve needs matplotlib, which is not installed; "
            "install it with pip install 'automodel_fn[plots]'."
        ) from error
    with rc_context({"svg.hashsalt": "automodel_fn", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(range(1, len(values) + 1), values, color="#3b7dd8", linewidth=1.6)
        if marks:
            axes.plot(*zip(*marks, strict=True), "o", color="#1b9e5a", label="fixed batch")
            axes.legend(frameon=False)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
