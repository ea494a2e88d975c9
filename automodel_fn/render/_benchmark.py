"""A benchmark's rows as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

_CAPTION = (
    "In brackets: ours divided by this peer's, median over the rounds; below 1 ours took less."
)
_MOST_IN_ONE = 5
Measures = Sequence[tuple[str, str]]


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
        remarks: What has to be said about how it was measured, or what came of a promise.
        absent: Why it was not measured, or "".
    """

    case: str
    subject: str = attrs.field(kw_only=True)
    is_ours: bool = attrs.field(default=False, kw_only=True)
    medians: tuple[float | None, ...] = attrs.field(default=(), kw_only=True)
    ratios: tuple[float | None, ...] = attrs.field(default=(), kw_only=True)
    pins_exact: bool | None = attrs.field(default=None, kw_only=True)
    remarks: tuple[str, ...] = attrs.field(default=(), kw_only=True)
    absent: str = attrs.field(default="", kw_only=True)


def benchmark_tables(
    title: str, measures: Measures, lines: Iterable[BenchmarkLine]
) -> tuple[Table, ...]:
    """A benchmark as one table, or as one a case where there are more than 5 measures.

    What is absent stands beneath, with the reason.

    Args:
        title: The heading.
        measures: (name, unit) of each measure.
        lines: One a case and subject.

    Example:
        >>> line = BenchmarkLine("few", subject="ours", medians=(2.0,), pins_exact=True)
        >>> benchmark_tables("cast", [("apply_ms", "ms")], [line])[0].row_count
        1
    """
    lines = tuple(lines)
    if len(measures) <= _MOST_IN_ONE:
        return (_table(title, measures, lines, of_one_case=False),)
    return tuple(
        _table(f"{title}: {case}", measures, of_case, of_one_case=True)
        for case, of_case in by_case(lines).items()
    )


def by_case(lines: Iterable[BenchmarkLine]) -> dict[str, list[BenchmarkLine]]:
    """The lines of each case, in their order."""
    found: dict[str, list[BenchmarkLine]] = {}
    for line in lines:
        found.setdefault(line.case, []).append(line)
    return found


def said_beneath(lines: Iterable[BenchmarkLine]) -> tuple[str, ...]:
    """What is absent and why, and what was measured otherwise, each once.

    Example:
        >>> said_beneath([BenchmarkLine("few", subject="peer", absent="it is not installed.")])
        ('absent: peer: it is not installed.',)
    """
    found: dict[str, None] = {}
    for line in lines:
        if line.absent:
            found[f"absent: {line.subject or line.case}: {line.absent}"] = None
        for remark in line.remarks:
            found[f"{line.case}, {line.subject}: {remark}"] = None
    return tuple(found)


def number_text(value: float) -> str:
    """A number to one decimal; one that would lose its digits by that as a power of ten.

    Example:
        >>> number_text(1234.56), number_text(0.0), number_text(0.00166)
        ('1,234.6', '0.0', '1.7e-03')
    """
    return f"{value:.1e}" if 0 < abs(value) < 0.1 else f"{value:,.1f}"


def _table(
    title: str, measures: Measures, lines: Sequence[BenchmarkLine], *, of_one_case: bool
) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", caption_justify="left")
    if not of_one_case:
        table.add_column("case", overflow="fold")
    table.add_column("subject", overflow="fold")
    for name, unit in measures:
        words = name.rpartition("_")[0] or name
        heading = f"{words.replace('_', chr(10))}\n{unit}".strip() if of_one_case else words
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    has_pins = any(line.pins_exact is not None for line in lines)
    if has_pins:
        table.add_column("pins exact", no_wrap=True)
    units = ["" if of_one_case else unit for _, unit in measures]
    for line in lines:
        cells = [line.case] * (not of_one_case) + _cells(line, units) + [_pins(line)] * has_pins
        style = "bold green" if line.is_ours else "dim" if line.absent else ""
        table.add_row(*map(Text, cells), style=style)
    has_ratios = any(ratio is not None for line in lines for ratio in line.ratios)
    table.caption = Text("\n".join([*[_CAPTION] * has_ratios, *said_beneath(lines)]))
    return table


def _cells(line: BenchmarkLine, units: Sequence[str]) -> list[str]:
    if line.absent:
        return [line.subject or "(all)", *("absent" for _ in units)]
    ratios = line.ratios or (None,) * len(units)
    values = [_value(*parts) for parts in zip(line.medians, units, ratios, strict=True)]
    return [line.subject, *values]


def _pins(line: BenchmarkLine) -> str:
    return {True: "yes", False: "NO", None: "-"}[line.pins_exact]


def _value(median: float | None, unit: str, ratio: float | None) -> str:
    if median is None:
        return "-"
    text = f"{number_text(median)} {unit}".rstrip()
    return text + (f" ({ratio:.2f})" if ratio is not None else "")
