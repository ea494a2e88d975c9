"""A result of a benchmark for a person: tables, Markdown, a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from automodel_fn.bench._result import BenchmarkResult
from automodel_fn.bench._rows import BenchmarkRow
from automodel_fn.cli._run_folder import check_file, write_file
from automodel_fn.errors import ConfigError
from automodel_fn.render._bars import Panel, bars_svg
from automodel_fn.render._benchmark import BenchmarkLine, Measures, benchmark_tables
from automodel_fn.render._benchmark_markdown import benchmark_markdown

_WITHOUT_GRAPH = "_by_graph"


def stored_result(path: Path) -> BenchmarkResult:
    """A result that was written before.

    Raises:
        ConfigError: It cannot be read, or is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"from={str(path)!r} cannot be read: {error}.") from error
    return BenchmarkResult.from_json(text)


def result_tables(result: BenchmarkResult) -> tuple[Table, ...]:
    """The result for a terminal."""
    where = f"{result.environment.device}, torch {result.environment.torch}"
    title = f"{result.name} on {where}, {_rounds(result)}"
    return benchmark_tables(title, _measures(result), _lines(result))


def result_markdown(result: BenchmarkResult) -> str:
    """The result for a page of documentation: where and how it was measured, and tables."""
    descriptions = [(case.name, case.description) for case in result.cases]
    return benchmark_markdown(_facts(result), _measures(result), _lines(result), descriptions)


def result_svg(result: BenchmarkResult) -> str:
    """A picture of the measures that are drawn.

    Raises:
        BackendUnavailableError: matplotlib is not installed.
    """
    return bars_svg([panel for panel in _panels(result) if panel.groups])


def check_views(markdown: Path | None, svg: Path | None) -> None:
    """See that the files can be written.

    Raises:
        ConfigError: One cannot.
    """
    for option, path in (("markdown", markdown), ("svg", svg)):
        if path is not None:
            check_file(option, path)


def write_views(result: BenchmarkResult, markdown: Path | None, svg: Path | None) -> None:
    """Write those of the two that were asked for.

    Raises:
        ConfigError: A file cannot be written.
        BackendUnavailableError: matplotlib is not installed.
    """
    if markdown is not None:
        write_file("markdown", markdown, result_markdown(result))
    if svg is not None:
        write_file("svg", svg, result_svg(result))


def _rounds(result: BenchmarkResult) -> str:
    return f"{result.rounds} round{'s' if result.rounds > 1 else ''}"


def _measures(result: BenchmarkResult) -> Measures:
    return [(measure.name, measure.unit) for measure in result.measures]


def _lines(result: BenchmarkResult) -> list[BenchmarkLine]:
    is_compared = [measure.is_compared for measure in result.measures]
    return [_line(row, is_compared) for row in result.rows()]


def _line(row: BenchmarkRow, is_compared: list[bool]) -> BenchmarkLine:
    exact = dict(row.facts).get("pins_exact")
    ratios = zip(row.ratios, is_compared, strict=False)
    return BenchmarkLine(
        row.case,
        subject=row.subject,
        is_ours=row.is_ours,
        medians=tuple(None if found is None else found.median for _, found in row.summaries),
        ratios=tuple(f.median if f is not None and shown else None for (_, f), shown in ratios),
        pins_exact=None if exact is None else bool(exact),
        remarks=(
            *(
                f"{name} is 0: timed without a CUDA graph"
                for name, value in row.facts
                if name.endswith(_WITHOUT_GRAPH) and value == 0
            ),
            *(f"{p.text}: {'kept' if p.is_kept else 'NOT KEPT'}" for p in row.promises),
        ),
        absent=row.absent,
    )


def _facts(result: BenchmarkResult) -> Iterator[str]:
    environment = result.environment
    yield f"{environment.device}, {environment.platform}, {result.date}, {_rounds(result)}"
    packages = [f"{name} {version}" for name, version in environment.packages if version]
    yield ", ".join([f"Python {environment.python}", f"torch {environment.torch}", *packages])
    yield from (f"{measure.name}: {measure.description}" for measure in result.measures)
    yield from result.conditions
    yield from (f"{subject.name}: {subject.description}" for subject in result.subjects)


def _panels(result: BenchmarkResult) -> Iterator[Panel]:
    for measure in result.measures:
        if measure.is_drawn:
            groups: dict[str, dict[str, float]] = {}
            for row in result.rows():
                found = dict(row.summaries).get(measure.name)
                if found is not None:
                    groups.setdefault(row.case, {})[row.subject] = found.median
            yield Panel(f"{measure.description}, {measure.unit}", groups=groups)
