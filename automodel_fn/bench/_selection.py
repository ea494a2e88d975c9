"""Which benchmark and which cases were asked for. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from automodel_fn.bench._spec import FULL, Benchmark, Case, Subject, matches_any
from automodel_fn.errors import ConfigError


def chosen_benchmark(name: str, benchmarks: Mapping[str, Benchmark]) -> Benchmark:
    """The benchmark of that name.

    Raises:
        ConfigError: There is none; those that there are are listed.
    """
    if name not in benchmarks:
        raise ConfigError(f"name={name!r} is no benchmark; there are: {', '.join(benchmarks)}.")
    return benchmarks[name]


def chosen_cases(
    benchmark: Benchmark, device: str, patterns: str | Iterable[str] = ()
) -> tuple[Case, ...]:
    """The cases of a device that are asked for, in the benchmark's order.

    Args:
        benchmark: The benchmark.
        device: "cpu" or "cuda".
        patterns: Names of cases, globs, or names of groups ("quick"); by default the group "full".

    Raises:
        ConfigError: No cases for that device, or a pattern that matches none.
    """
    here = tuple(case for case in benchmark.cases if case.device == device)
    if not here:
        known = dict.fromkeys(case.device for case in benchmark.cases)
        raise ConfigError(
            f"device={device!r} must be one that benchmark {benchmark.name!r} has cases for: "
            f"{', '.join(known)}."
        )
    asked = ((patterns,) if isinstance(patterns, str) else tuple(patterns)) or (FULL,)
    for pattern in asked:
        if not any(_matches(case, pattern) for case in here):
            names = ", ".join(case.name for case in here)
            groups = ", ".join(dict.fromkeys(case.group for case in here))
            raise ConfigError(
                f"case={pattern!r} matches no case of benchmark {benchmark.name!r} on {device}; "
                f"there are: {names}; groups: {groups}."
            )
    return tuple(case for case in here if any(_matches(case, pattern) for pattern in asked))


def chosen_subjects(
    benchmark: Benchmark, patterns: str | Iterable[str] = ()
) -> tuple[Subject, ...]:
    """The subjects that are asked for, in the benchmark's order; ours is always among them.

    Args:
        benchmark: The benchmark.
        patterns: Names of subjects, or globs; by default all.

    Raises:
        ConfigError: A pattern that matches none.
    """
    asked = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in asked:
        if not any(matches_any(subject.name, [pattern]) for subject in benchmark.subjects):
            names = "; ".join(subject.name for subject in benchmark.subjects)
            raise ConfigError(
                f"subject={pattern!r} matches no subject of benchmark {benchmark.name!r}; "
                f"there are: {names}."
            )
    return tuple(
        subject
        for subject in benchmark.subjects
        if not asked or subject.name == benchmark.ours or matches_any(subject.name, asked)
    )


def _matches(case: Case, pattern: str) -> bool:
    return pattern == case.group or matches_any(case.name, [pattern])
