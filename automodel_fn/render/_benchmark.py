"""A benchmark's rows as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

_CAPTION = (
    "In brackets: ours divided by this peer's, median over the rounds; below 1 ours took less."
)


@attrs.frozen
class BenchmarkLine:
    """What one subject did on one case.

    Args:
        case: The case's name.
        subject: The subject's name; "" for all of them.
        is_ours: Whether the subject is ours.
        medians: The median of each measure; None where it was not measured.
        ratios: Of each measure ours divided by this one; None where there is none.
        pins_exact: Whether the fp32 pins kept every bit; None if there were none.
        absent: Why it was not measured, or "".
    """

    case: str
    subject: str = attrs.field(kw_only=True)
    is_ours: bool = attrs.field(default=False, kw_only=True)
    medians: tuple[float | None, ...] = attrs.field(default=(), kw_only=True)
    ratios: tuple[float | None, ...] = attrs.field(default=(), kw_only=True)
    pins_exact: bool | None = attrs.field(default=None, kw_only=True)
    absent: str = attrs.field(default="", kw_only=True)


def benchmark_table(
    title: str, measures: Sequence[tuple[str, str]], lines: Iterable[BenchmarkLine]
) -> Table:
    """A table of a benchmark; what is absent stands beneath it, with the reason.

    Args:
        title: The heading.
        measures: (name, unit) of each measure.
        lines: One a case and subject.

    Example:
        >>> line = BenchmarkLine("few", subject="ours", medians=(2.0,), pins_exact=True)
        >>> benchmark_table("cast", [("apply_ms", "ms")], [line]).row_count
        1
    """
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", caption_justify="left")
    table.add_column("case", overflow="fold")
    table.add_column("subject", overflow="fold")
    for name, _ in measures:
        table.add_column(name.rpartition("_")[0] or name, justify="right", no_wrap=True)
    table.add_column("pins exact", no_wrap=True)
    units = [unit for _, unit in measures]
    reasons: dict[str, None] = {}
    for line in lines:
        style = "bold green" if line.is_ours else "dim" if line.absent else ""
        table.add_row(*map(Text, _cells(line, units)), style=style)
        if line.absent:
            reasons[f"absent: {line.subject or line.case}: {line.absent}"] = None
    table.caption = Text("\n".join([_CAPTION, *reasons]))
    return table


def _cells(line: BenchmarkLine, units: Sequence[str]) -> list[str]:
    if line.absent:
        return [line.case, line.subject or "(all)", *("absent" for _ in units), "-"]
    pins = {True: "yes", False: "NO", None: "-"}[line.pins_exact]
    ratios = line.ratios or (None,) * len(units)
    values = [_value(*parts) for parts in zip(line.medians, units, ratios, strict=True)]
    return [line.case, line.subject, *values, pins]


def _value(median: float | None, unit: str, ratio: float | None) -> str:
    if median is None:
        return "-"
    return f"{median:,.1f} {unit}" + (f" ({ratio:.2f})" if ratio is not None else "")
