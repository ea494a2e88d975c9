"""The command bench: list the benchmarks, or run one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from automodel_fn.bench._launch import launch as launch_process
from automodel_fn.bench._registry import BENCHMARKS
from automodel_fn.bench._result import BenchmarkResult
from automodel_fn.bench._rows import BenchmarkRow, Summaries
from automodel_fn.bench._runner import Launch, Progress, run_benchmark
from automodel_fn.cli._run_folder import check_file, write_file
from automodel_fn.render._benchmark import BenchmarkLine, benchmark_table
from automodel_fn.render._table import simple_table


def benchmark_lists() -> Iterator[Table]:
    """A table of its cases for each benchmark."""
    for benchmark in BENCHMARKS.values():
        rows = [(c.device, c.name, c.group, c.description) for c in benchmark.cases]
        title = f"{benchmark.name}: {benchmark.description}"
        yield simple_table(title, ("device", "case", "group", "input"), rows)


def benchmarks_json() -> str:
    """The same as JSON text."""
    fields = ("device", "name", "group", "description")
    found = {
        benchmark.name: {
            "description": benchmark.description,
            "cases": [{name: getattr(case, name) for name in fields} for case in benchmark.cases],
        }
        for benchmark in BENCHMARKS.values()
    }
    return json.dumps(found, indent=1) + "\n"


def measure(
    name: str,
    *,
    device: str,
    rounds: int,
    cases: Sequence[str],
    out: Path | None,
    progress: Console,
    launch: Launch = launch_process,
) -> BenchmarkResult:
    """Run a benchmark and write its JSON.

    Args:
        name: The benchmark's name.
        device: "cpu" or "cuda".
        rounds: How often everything is measured.
        cases: Names, globs or groups.
        out: Where to write the result.
        progress: Where to say what is measured next.
        launch: Answers a request in a fresh process.

    Raises:
        ConfigError: An argument cannot be met.
        BenchmarkError: A measurement failed.
    """
    if out is not None:
        check_file("out", out)
    result = run_benchmark(
        name,
        device=device,
        rounds=rounds,
        cases=cases,
        on_progress=_teller(progress),
        launch=launch,
    )
    if out is not None:
        write_file("out", out, result.to_json())
    return result


def _teller(console: Console) -> Callable[[Progress], None]:
    def tell(step: Progress) -> None:
        number = f"{step.num_done + 1}/{step.num_total}"
        text = f"{number} round {step.round}: {step.case}, {step.subject}"
        console.print(Text(text), soft_wrap=True)

    return tell


def result_table(result: BenchmarkResult) -> Table:
    """The result for a person."""
    where = f"{result.environment.device}, torch {result.environment.torch}"
    rounds = f"{result.rounds} round{'s' if result.rounds > 1 else ''}"
    return benchmark_table(
        f"{result.name} on {where}, {rounds}",
        [(measure.name, measure.unit) for measure in result.measures],
        map(_line, result.rows()),
    )


def _line(row: BenchmarkRow) -> BenchmarkLine:
    exact = dict(row.facts).get("pins_exact")
    return BenchmarkLine(
        row.case,
        subject=row.subject,
        is_ours=row.is_ours,
        medians=_medians(row.summaries),
        ratios=_medians(row.ratios),
        pins_exact=None if exact is None else bool(exact),
        absent=row.absent,
    )


def _medians(summaries: Summaries) -> tuple[float | None, ...]:
    return tuple(None if found is None else found.median for _, found in summaries)


def broken_claims(result: BenchmarkResult) -> tuple[str, ...]:
    """What ours promises and did not keep, in words."""
    return tuple(
        f"{row.case}: {row.subject} promises {', '.join(row.broken_claims)}"
        for row in result.rows()
        if row.is_ours and row.broken_claims
    )
