"""A benchmark's rows as Markdown, for a page of documentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from automodel_fn.render._benchmark import (
    BenchmarkLine,
    Measures,
    by_case,
    number_text,
    said_beneath,
)


def benchmark_markdown(
    facts: Iterable[str],
    measures: Measures,
    lines: Iterable[BenchmarkLine],
    descriptions: Iterable[tuple[str, str]],
) -> str:
    """A list of facts, then for each case its description, a table, and what is absent.

    A measure that nobody has in a case has no column there. The row of ours is bold.

    Args:
        facts: What, where, when and how, each a line.
        measures: (name, unit) of each measure.
        lines: One a case and subject.
        descriptions: (case, what it is in words).

    Example:
        >>> line = BenchmarkLine("few", subject="model.to", medians=(2.0, None))
        >>> measures = [("apply_ms", "ms"), ("plan_ms", "ms")]
        >>> print(benchmark_markdown(["on a CPU"], measures, [line], [("few", "8 tensors")]))
        - on a CPU
        <BLANKLINE>
        ### few
        <BLANKLINE>
        8 tensors
        <BLANKLINE>
        | subject | apply, ms |
        |---|---:|
        | model.to | 2.0 |
        <BLANKLINE>
    """
    words = dict(descriptions)
    parts = ["\n".join(f"- {fact}" for fact in facts)]
    for case, of_case in by_case(lines).items():
        parts += [f"### {case}", _escaped(words[case])]
        if any(line.subject for line in of_case):
            parts.append(_table(measures, of_case))
        if said := said_beneath(of_case):
            parts.append("\n".join(f"- {_escaped(line)}" for line in said))
    return "\n\n".join(parts) + "\n"


def _table(measures: Measures, lines: Sequence[BenchmarkLine]) -> str:
    shown = [
        index
        for index in range(len(measures))
        if any(line.medians and line.medians[index] is not None for line in lines)
    ]
    headings = [_heading(*measures[index]) for index in shown]
    rows = [f"| {' | '.join(['subject', *headings])} |", f"|---|{'---:|' * len(headings)}"]
    for line in lines:
        cells = [_escaped(line.subject), *(_cell(line, index) for index in shown)]
        rows.append(f"| {' | '.join(f'**{c}**' if line.is_ours else c for c in cells)} |")
    return "\n".join(rows)


def _heading(name: str, unit: str) -> str:
    words = (name.rpartition("_")[0] or name).replace("_", " ")
    return f"{words}, {unit}" if unit else words


def _cell(line: BenchmarkLine, index: int) -> str:
    if line.absent:
        return "absent"
    value = line.medians[index]
    return "-" if value is None else number_text(value)


def _escaped(text: str) -> str:
    for character in "\\|*`<":
        text = text.replace(character, f"\\{character}")
    return text
