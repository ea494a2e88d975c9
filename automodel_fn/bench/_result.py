"""What a run of a benchmark found, as a value."""

from __future__ import annotations

from typing import Any

import attrs

from automodel_fn.bench._json import result_from_json, result_to_json
from automodel_fn.bench._rows import BenchmarkRow, result_rows
from automodel_fn.bench._spec import Measure, Pairs, Promise, pairs


@attrs.frozen
class Environment:
    """Where a run took place.

    Args:
        python: Version of Python.
        torch: Version of PyTorch.
        platform: The operating system, in words.
        device: The processor's or the accelerator's name.
        num_threads: How many threads PyTorch used on the CPU.
        num_cpus: How many processors the run could use.
        free_bytes: Free memory of the device before the run; None if unknown.
        packages: (name, version) of what the subjects need; None if it is not installed.
    """

    python: str
    torch: str = attrs.field(kw_only=True)
    platform: str = attrs.field(kw_only=True)
    device: str = attrs.field(kw_only=True)
    num_threads: int = attrs.field(kw_only=True)
    num_cpus: int = attrs.field(kw_only=True)
    free_bytes: int | None = attrs.field(kw_only=True)
    packages: tuple[tuple[str, str | None], ...] = attrs.field(kw_only=True)

    @classmethod
    def from_report(cls, report: dict[str, Any]) -> Environment:
        """The environment that a worker reports."""
        fields: dict[str, Any] = {**report, "packages": tuple(report["packages"].items())}
        return cls(**fields)


@attrs.frozen
class Measurement:
    """What was found for one subject on one case in one round.

    Args:
        case: The case's name.
        subject: The subject's name.
        round: The number of the round, from 1.
        values: Each measure's value; None where it was not measured.
        facts: What was checked afterwards.
        problem: Why a peer could not be measured on this case, or "".
    """

    case: str
    subject: str = attrs.field(kw_only=True)
    round: int = attrs.field(kw_only=True)
    values: Pairs = attrs.field(kw_only=True, converter=pairs)
    facts: Pairs = attrs.field(kw_only=True, converter=pairs)
    problem: str = attrs.field(default="", kw_only=True)


@attrs.frozen
class Absence:
    """A subject or a case that was not measured, and why.

    Args:
        kind: "subject" or "case".
        name: Its name.
        reason: Why, and what to do.
    """

    kind: str
    name: str = attrs.field(kw_only=True)
    reason: str = attrs.field(kw_only=True)


@attrs.frozen
class Description:
    """A case or a subject in words.

    Args:
        name: Its name.
        description: The words.
        claims: Of a subject: the facts that it promises to be 1.
        promises: Of a subject: the bounds of measures that it promises.
        cases: Of a subject: globs of the cases that it is for.
    """

    name: str
    description: str = attrs.field(kw_only=True)
    claims: tuple[str, ...] = attrs.field(default=(), kw_only=True)
    promises: tuple[Promise, ...] = attrs.field(default=(), kw_only=True)
    cases: tuple[str, ...] = attrs.field(default=("*",), kw_only=True)


@attrs.frozen
class BenchmarkResult:
    """What a run of a benchmark found: every single measurement, and what is needed to judge it.

    Args:
        name: The benchmark's name.
        date: When it ran, ISO 8601.
        device: "cpu" or "cuda".
        rounds: How many rounds there were.
        ours: Name of the subject that is ours.
        conditions: How it was measured, in words.
        environment: Where it was measured.
        measures: What was measured.
        cases: The cases that were asked for.
        subjects: The subjects, absent ones too.
        measurements: One a case, round and subject, in the order in which they ran.
        absent: What was not measured, and why.
    """

    name: str
    date: str = attrs.field(kw_only=True)
    device: str = attrs.field(kw_only=True)
    rounds: int = attrs.field(kw_only=True)
    ours: str = attrs.field(kw_only=True)
    conditions: tuple[str, ...] = attrs.field(kw_only=True)
    environment: Environment = attrs.field(kw_only=True)
    measures: tuple[Measure, ...] = attrs.field(kw_only=True)
    cases: tuple[Description, ...] = attrs.field(kw_only=True)
    subjects: tuple[Description, ...] = attrs.field(kw_only=True)
    measurements: tuple[Measurement, ...] = attrs.field(kw_only=True)
    absent: tuple[Absence, ...] = attrs.field(kw_only=True)

    def rows(self) -> tuple[BenchmarkRow, ...]:
        """One row a case and subject: medians, our ratios to the peers, what is absent and why."""
        return result_rows(self)

    def to_json(self) -> str:
        """The result as JSON text; its "rows" are for readers, `from_json` makes its own."""
        return result_to_json(self)

    @classmethod
    def from_json(cls, text: str) -> BenchmarkResult:
        """The result of a JSON text.

        Raises:
            ConfigError: The text is no benchmark result; the message names the place.
        """
        return result_from_json(text, cls)
