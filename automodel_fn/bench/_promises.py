"""What a subject promises of its measures, beside what was measured. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from automodel_fn.bench._spec import Promise
from automodel_fn.bench._statistics import paired_ratio, summary

ByRound = Mapping[int, float | None]


@attrs.frozen
class Outcome:
    """What became of a promise on a case.

    Args:
        text: What was promised and what was measured, in words.
        is_kept: Whether it was kept.
    """

    text: str
    is_kept: bool = attrs.field(kw_only=True)


def outcome_of(promise: Promise, mine: ByRound, peers: ByRound) -> Outcome | None:
    """What became of a promise; None where one of the two was not measured.

    Args:
        promise: The promise.
        mine: The measure in each round.
        peers: The same of the peer that it names; not read where it names none.

    Example:
        >>> promise = Promise("throughput_tps", at_least=1.2, peer="plain")
        >>> outcome_of(promise, {1: 130.0, 2: 110.0}, {1: 100.0, 2: 100.0})
        Outcome(text='throughput_tps 1.2 times that of plain, at least 1.2', is_kept=True)
    """
    found = paired_ratio(mine, peers) if promise.peer else summary(mine.values())
    if found is None:
        return None
    value, bounds, is_kept = found.median, list[str](), True
    if promise.at_least is not None:
        bounds.append(f"at least {promise.at_least:g}")
        is_kept = value >= promise.at_least
    if promise.at_most is not None:
        bounds.append(f"at most {promise.at_most:g}")
        is_kept = is_kept and value <= promise.at_most
    compared = f" times that of {promise.peer}" if promise.peer else ""
    text = f"{promise.measure} {value:.4g}{compared}, {' and '.join(bounds)}"
    return Outcome(text, is_kept=is_kept)
