"""What a benchmark is: cases, subjects, measures. Values only; nothing is measured here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import attrs

FULL, QUICK = "full", "quick"

Number = int | float
Pairs = tuple[tuple[str, Number | None], ...]


def pairs(value: Mapping[str, Number | None] | Pairs) -> Pairs:
    """A mapping as a tuple of pairs, which is frozen and can be compared.

    Example:
        >>> pairs({"apply_ms": 1.5})
        (('apply_ms', 1.5),)
    """
    items = value.items() if isinstance(value, Mapping) else value
    return tuple((name, number) for name, number in items)


@attrs.frozen
class Measure:
    """Something that is measured.

    Args:
        name: Its name, which ends in its unit, as "apply_ms".
        unit: The unit in words.
        description: What exactly is measured.
        lower_is_better: Whether less is better.
        is_drawn: Whether a picture of the result shows it.
        is_compared: Whether a table shows ours divided by a peer's.
    """

    name: str
    unit: str = attrs.field(kw_only=True)
    description: str = attrs.field(kw_only=True)
    lower_is_better: bool = attrs.field(default=True, kw_only=True)
    is_drawn: bool = attrs.field(default=False, kw_only=True)
    is_compared: bool = attrs.field(default=True, kw_only=True)


@attrs.frozen
class Case:
    """One input on which every subject is measured.

    Args:
        name: Its name, unique on its device.
        device: "cpu" or "cuda".
        description: The input in words.
        parameters: What the subjects build the input from.
        needed_bytes: Free memory of the device that it takes; with less the case is absent.
        group: "full" (what runs by default) or "quick".
        batch: Where a benchmark measures its subjects together: cases of one batch share a process.
    """

    name: str
    device: str = attrs.field(kw_only=True)
    description: str = attrs.field(kw_only=True)
    parameters: Pairs = attrs.field(kw_only=True, converter=pairs)
    needed_bytes: int = attrs.field(kw_only=True)
    group: str = attrs.field(default=FULL, kw_only=True)
    batch: str = attrs.field(default="", kw_only=True)

    def parameter(self, name: str) -> int:
        """The parameter of that name.

        Example:
            >>> Case("c", device="cpu", description="", parameters={"rows": 2},
            ...      needed_bytes=0).parameter("rows")
            2
        """
        value = dict(self.parameters)[name]
        assert isinstance(value, int)
        return value


@attrs.frozen
class Measured:
    """What a process found for one subject on one case.

    Args:
        values: Each measure's value; None where it was not measured.
        facts: What was checked afterwards, as data: 1 or 0 for yes or no, or a count; None where
            there was nothing to check.
        problem: Why a peer could not be measured on this case, or "".
    """

    values: Pairs = attrs.field(converter=pairs)
    facts: Pairs = attrs.field(default=(), kw_only=True, converter=pairs)
    problem: str = attrs.field(default="", kw_only=True)


@attrs.frozen
class Promise:
    """A bound that a subject promises of a measure, of its median over the rounds.

    Args:
        measure: The measure's name.
        at_least: The least that it is; None: no bound.
        at_most: The most that it is; None: no bound.
        peer: Name of a subject by whose value of the same round it is divided first; "": by none.
        cases: Globs of the cases for which it is promised.
    """

    measure: str
    at_least: Number | None = attrs.field(default=None, kw_only=True)
    at_most: Number | None = attrs.field(default=None, kw_only=True)
    peer: str = attrs.field(default="", kw_only=True)
    cases: tuple[str, ...] = attrs.field(default=("*",), kw_only=True)


@attrs.frozen
class Subject:
    """Something that is measured: ours, or a peer that does the same job.

    Args:
        name: Its name.
        description: What it does, and what it does not.
        measure: Builds the input of a case, runs the subject on it and checks the outcome;
            None where the benchmark measures its subjects together.
        load: Imports what the subject needs; an error makes it absent, with that reason.
        package: Name on the package index of what it needs, whose version is recorded; or "".
        claims: Names of the facts that it promises to be 1.
        promises: Bounds of measures that it promises.
        cases: Globs of the cases that it is for; a case that none of them matches has no such
            subject.
    """

    name: str
    description: str = attrs.field(kw_only=True)
    measure: Callable[[Case], Measured] | None = attrs.field(default=None, kw_only=True)
    load: Callable[[], object] = attrs.field(default=lambda: None, kw_only=True)
    package: str = attrs.field(default="", kw_only=True)
    claims: tuple[str, ...] = attrs.field(default=(), kw_only=True)
    promises: tuple[Promise, ...] = attrs.field(default=(), kw_only=True)
    cases: tuple[str, ...] = attrs.field(default=("*",), kw_only=True)


def matches_any(name: str, globs: Sequence[str]) -> bool:
    """Whether one of the globs matches the name.

    Example:
        >>> matches_any("norm-8192x4096", ["rope-*", "norm-*"])
        True
    """
    return any(fnmatchcase(name, glob) for glob in globs)


Together = Callable[[Case, Sequence[str]], Mapping[str, Measured]]
"""Measures subjects, given by their names, on one case in this process; by name what it found."""


@attrs.frozen
class Benchmark:
    """A benchmark: every subject on every case.

    By default each measurement has a process of its own. Where starting one costs more than
    measuring, and what is measured leaves nothing behind, `together` measures all subjects of a
    case in turns in one process, which also serves the other cases of the batch.

    Args:
        name: Its name; it stands in the file `_bench_<name>.py`, as `BENCHMARK`, a hyphen as an
            underscore.
        description: What is compared.
        measures: What is measured.
        cases: The inputs, of all devices.
        subjects: What is compared; one of them is ours.
        ours: The name of that one, with which peers are compared; subjects of that name, a comma
            and a word are ours as well.
        conditions: How it is measured, in words: warm-up, garbage collector, checks.
        together: Measures the subjects of a case together; None: each measures itself.
    """

    name: str
    description: str = attrs.field(kw_only=True)
    measures: tuple[Measure, ...] = attrs.field(kw_only=True)
    cases: tuple[Case, ...] = attrs.field(kw_only=True)
    subjects: tuple[Subject, ...] = attrs.field(kw_only=True)
    ours: str = attrs.field(kw_only=True)
    conditions: tuple[str, ...] = attrs.field(default=(), kw_only=True)
    together: Together | None = attrs.field(default=None, kw_only=True)

    def __attrs_post_init__(self) -> None:
        """See that every subject is measured in one way."""
        is_together = self.together is not None
        assert all((subject.measure is None) is is_together for subject in self.subjects)
