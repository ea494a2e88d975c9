"""Run a benchmark: every subject of a round in turn, in fresh processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import attrs
import torch

from automodel_fn.bench._launch import launch as launch_process
from automodel_fn.bench._registry import BENCHMARKS
from automodel_fn.bench._result import (
    Absence,
    BenchmarkResult,
    Description,
    Environment,
    Measurement,
)
from automodel_fn.bench._selection import chosen_benchmark, chosen_cases, chosen_subjects
from automodel_fn.bench._spec import Benchmark, Case, matches_any
from automodel_fn.errors import ConfigError

Launch = Callable[[Mapping[str, Any]], dict[str, Any]]


@attrs.frozen
class Progress:
    """What is measured next, in one fresh process.

    Args:
        cases: The names of the cases.
        subjects: The names of the subjects.
        round: The number of the round, from 1.
        num_done: How many processes are done.
        num_total: How many there will be.
    """

    cases: tuple[str, ...]
    subjects: tuple[str, ...] = attrs.field(kw_only=True)
    round: int = attrs.field(kw_only=True)
    num_done: int = attrs.field(kw_only=True)
    num_total: int = attrs.field(kw_only=True)


def run_benchmark(
    name: str,
    *,
    device: str = "cpu",
    rounds: int = 3,
    cases: str | Iterable[str] = (),
    subjects: str | Iterable[str] = (),
    on_progress: Callable[[Progress], None] | None = None,
    date: str | None = None,
    launch: Launch = launch_process,
) -> BenchmarkResult:
    """Measure ours and its peers in one run, each measurement in a fresh process.

    A benchmark that measures its subjects together takes one process for a batch of cases. In each
    round every subject runs once, in an order that turns from round to round. A peer that
    is not installed, and a case that the device has no memory for, are listed as absent with the
    reason.

    Args:
        name: One of `BENCHMARKS`.
        device: "cpu" or "cuda".
        rounds: How often everything is measured.
        cases: Names of cases, globs, or names of groups; by default the group "full".
        subjects: Names of subjects, or globs; by default all. Ours is always measured.
        on_progress: Called before each process.
        date: ISO 8601; by default now.
        launch: Answers a request in a fresh process.

    Raises:
        ConfigError: An argument names something that there is not.
        BenchmarkError: A worker failed; its last lines are in the message.
    """
    benchmark = chosen_benchmark(name, BENCHMARKS)
    chosen = chosen_cases(benchmark, device, cases)
    benchmark = attrs.evolve(benchmark, subjects=chosen_subjects(benchmark, subjects))
    _check(device, rounds)
    report = launch({"benchmark": name, "device": device})
    environment = Environment.from_report(report["environment"])
    absent = (
        *(
            Absence("subject", name=subject.name, reason=report["absent"][subject.name])
            for subject in benchmark.subjects
            if subject.name in report["absent"]
        ),
        *_too_large(chosen, environment.free_bytes),
    )
    jobs = tuple(_jobs(benchmark, chosen, absent, rounds))
    return BenchmarkResult(
        name,
        date=date or datetime.now(UTC).isoformat(timespec="seconds"),
        device=device,
        rounds=rounds,
        ours=benchmark.ours,
        conditions=benchmark.conditions,
        environment=environment,
        measures=benchmark.measures,
        cases=tuple(Description(c.name, description=c.description) for c in chosen),
        subjects=tuple(
            Description(
                s.name,
                description=s.description,
                claims=s.claims,
                promises=s.promises,
                cases=s.cases,
            )
            for s in benchmark.subjects
        ),
        measurements=tuple(_measured(benchmark, device, jobs, on_progress, launch)),
        absent=absent,
    )


def _check(device: str, rounds: int) -> None:
    if rounds < 1:
        raise ConfigError(f"rounds={rounds} must be at least 1.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device='cuda' needs a CUDA device, and torch {torch.__version__} finds none; "
            "use device='cpu'."
        )


def _too_large(cases: Sequence[Case], free_bytes: int | None) -> Iterator[Absence]:
    for case in cases:
        if free_bytes is not None and case.needed_bytes > free_bytes:
            reason = (
                f"it needs {case.needed_bytes / 2**30:.1f} GiB of free memory, and the device "
                f"has {free_bytes / 2**30:.1f} GiB."
            )
            yield Absence("case", name=case.name, reason=reason)


@attrs.frozen
class _Job:
    """What one fresh process measures."""

    round: int
    cases: tuple[str, ...]
    subjects: tuple[str, ...]


def _jobs(
    benchmark: Benchmark, chosen: Sequence[Case], absent: Sequence[Absence], rounds: int
) -> Iterator[_Job]:
    """Rounds outermost, so that all that is compared is spread over the same time."""
    missing = {(item.kind, item.name) for item in absent}
    cases = [case for case in chosen if ("case", case.name) not in missing]
    subjects = [s for s in benchmark.subjects if ("subject", s.name) not in missing]
    for number in range(1, rounds + 1):
        first = (number - 1) % len(subjects)
        turned = (*subjects[first:], *subjects[:first])
        if benchmark.together is not None:
            names = tuple(subject.name for subject in turned)
            for batch in dict.fromkeys(case.batch for case in cases):
                together = tuple(case.name for case in cases if case.batch == batch)
                yield _Job(number, together, names)
            continue
        for case in cases:
            for subject in turned:
                if matches_any(case.name, subject.cases):
                    yield _Job(number, (case.name,), (subject.name,))


def _measured(
    benchmark: Benchmark,
    device: str,
    jobs: Sequence[_Job],
    on_progress: Callable[[Progress], None] | None,
    launch: Launch,
) -> Iterator[Measurement]:
    for done, job in enumerate(jobs):
        if on_progress is not None:
            step = Progress(
                job.cases,
                subjects=job.subjects,
                round=job.round,
                num_done=done,
                num_total=len(jobs),
            )
            on_progress(step)
        asked = {"cases": [*job.cases], "subjects": [*job.subjects]}
        found = launch({"benchmark": benchmark.name, "device": device, **asked})
        for measured in found["measured"]:
            yield Measurement(**measured, round=job.round)
