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
from automodel_fn.bench._runner import Launch, Progress, run_benchmark
from automodel_fn.cli._bench_views import stored_result
from automodel_fn.cli._run_folder import check_file, write_file
from automodel_fn.errors import ConfigError
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


def result_of(
    name: str | None,
    stored: Path | None,
    *,
    device: str,
    rounds: int,
    cases: Sequence[str],
    subjects: Sequence[str] = (),
    out: Path | None,
    progress: Console,
    launch: Launch = launch_process,
) -> BenchmarkResult:
    """Run a benchmark, or read the result of one; write its JSON.

    Args:
        name: The benchmark's name, or None.
        stored: Where a result stands, or None; one of the two is given.
        device: "cpu" or "cuda".
        rounds: How often everything is measured.
        cases: Names, globs or groups.
        subjects: Names or globs; none for all.
        out: Where to write the result; None: nowhere.
        progress: Where to say what is measured next.
        launch: Answers a request in a fresh process.

    Raises:
        ConfigError: An argument cannot be met.
        BenchmarkError: A measurement failed.
    """
    if out is not None:
        check_file("out", out)
    if stored is not None:
        if name is not None:
            raise ConfigError(f"name={name!r} and from={str(stored)!r} exclude each other.")
        result = stored_result(stored)
    else:
        assert name is not None
        result = run_benchmark(
            name,
            device=device,
            rounds=rounds,
            cases=cases,
            subjects=subjects,
            on_progress=_teller(progress),
            launch=launch,
        )
    if out is not None:
        write_file("out", out, result.to_json())
    return result


def _teller(console: Console) -> Callable[[Progress], None]:
    def tell(step: Progress) -> None:
        number = f"{step.num_done + 1}/{step.num_total}"
        text = f"{number} round {step.round}: {', '.join((*step.cases, *step.subjects))}"
        console.print(Text(text), soft_wrap=True)

    return tell


def broken_claims(result: BenchmarkResult) -> tuple[str, ...]:
    """What ours promises and did not keep, in words."""
    return tuple(
        f"{row.case}: {row.subject} promises {', '.join(row.broken_claims)}"
        for row in result.rows()
        if row.is_ours and row.broken_claims
    )
