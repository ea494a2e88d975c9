"""A result as rows, from which a table can be made. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import attrs

from automodel_fn.bench._promises import Outcome, outcome_of
from automodel_fn.bench._spec import matches_any
from automodel_fn.bench._statistics import Summary, paired_ratio, summary

if TYPE_CHECKING:
    from automodel_fn.bench._result import BenchmarkResult, Description, Measurement

Summaries = tuple[tuple[str, Summary | None], ...]


@attrs.frozen
class BenchmarkRow:
    """One case and one subject of a result.

    Args:
        case: The case's name.
        subject: The subject's name; "" where the whole case is absent.
        is_ours: Whether the subject is ours, or a variant of it.
        summaries: (measure, its summary over the rounds), in the order of the measures; None where
            it was not measured.
        ratios: (measure, ours divided by this peer's in each round), where less than 1 means that
            ours took less; for ours, and for what is absent, empty.
        facts: (fact, what it was in every round; None where the rounds disagree or had nothing to
            check).
        promises: What became of the bounds that the subject promises.
        broken_claims: Facts that the subject promises and that were not so in some round, and the
            words of promises that were not kept.
        absent: Why it was not measured, or "".
    """

    case: str
    subject: str = attrs.field(kw_only=True)
    is_ours: bool = attrs.field(default=False, kw_only=True)
    summaries: Summaries = attrs.field(default=(), kw_only=True)
    ratios: Summaries = attrs.field(default=(), kw_only=True)
    facts: tuple[tuple[str, float | None], ...] = attrs.field(default=(), kw_only=True)
    promises: tuple[Outcome, ...] = attrs.field(default=(), kw_only=True)
    broken_claims: tuple[str, ...] = attrs.field(default=(), kw_only=True)
    absent: str = attrs.field(default="", kw_only=True)


def result_rows(result: BenchmarkResult) -> tuple[BenchmarkRow, ...]:
    """One row a case and subject that is for it, in the order of both; one for an absent case."""
    reasons = {(item.kind, item.name): item.reason for item in result.absent}
    rows: list[BenchmarkRow] = []
    for case in result.cases:
        reason = reasons.get(("case", case.name), "")
        if reason:
            rows.append(BenchmarkRow(case.name, subject="", absent=reason))
            continue
        for subject in result.subjects:
            if matches_any(case.name, subject.cases):
                reason = reasons.get(("subject", subject.name), "")
                rows.append(_row(result, case.name, subject.name, reason))
    return tuple(rows)


def _row(result: BenchmarkResult, case: str, subject: str, absent: str) -> BenchmarkRow:
    is_ours = subject == result.ours or subject.startswith(f"{result.ours}, ")
    mine = _selected(result, case, subject)
    absent = next((m.problem for m in mine if m.problem), absent)
    if absent:
        return BenchmarkRow(case, subject=subject, is_ours=is_ours, absent=absent)
    ours = _selected(result, case, result.ours)
    names = tuple(measure.name for measure in result.measures)
    described = next(item for item in result.subjects if item.name == subject)
    promises = tuple(_outcomes(result, case, described))
    return BenchmarkRow(
        case,
        subject=subject,
        is_ours=is_ours,
        summaries=tuple((name, summary(_by_round(mine, name).values())) for name in names),
        ratios=()
        if is_ours
        else tuple((n, paired_ratio(_by_round(ours, n), _by_round(mine, n))) for n in names),
        facts=_agreed_facts(mine),
        promises=promises,
        broken_claims=(
            *(c for c in described.claims if any(dict(m.facts).get(c) == 0 for m in mine)),
            *(promise.text for promise in promises if not promise.is_kept),
        ),
    )


def _outcomes(result: BenchmarkResult, case: str, subject: Description) -> Iterator[Outcome]:
    mine = _selected(result, case, subject.name)
    for promise in subject.promises:
        if matches_any(case, promise.cases):
            peers = _selected(result, case, promise.peer)
            name = promise.measure
            found = outcome_of(promise, _by_round(mine, name), _by_round(peers, name))
            if found is not None:
                yield found


def _selected(result: BenchmarkResult, case: str, subject: str) -> tuple[Measurement, ...]:
    return tuple(m for m in result.measurements if (m.case, m.subject) == (case, subject))


def _by_round(measurements: tuple[Measurement, ...], name: str) -> dict[int, float | None]:
    return {m.round: dict(m.values).get(name) for m in measurements}


def _agreed_facts(
    measurements: tuple[Measurement, ...],
) -> tuple[tuple[str, float | None], ...]:
    names = dict.fromkeys(name for m in measurements for name, _ in m.facts)
    found = {name: {dict(m.facts).get(name) for m in measurements} for name in names}
    return tuple(
        (name, next(iter(values)) if len(values) == 1 else None) for name, values in found.items()
    )
