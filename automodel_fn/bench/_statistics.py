"""Summaries of repeated measurements, and ratios of paired ones. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping

import attrs


@attrs.frozen
class Summary:
    """A quantity over the rounds of a run.

    Args:
        median: Its median.
        minimum: The least that was measured.
        maximum: The most that was measured.
        num_rounds: In how many rounds it was measured.
    """

    median: float
    minimum: float = attrs.field(kw_only=True)
    maximum: float = attrs.field(kw_only=True)
    num_rounds: int = attrs.field(kw_only=True)


def summary(values: Iterable[float | None]) -> Summary | None:
    """Median, least and most of what was measured; None if nothing was.

    Example:
        >>> summary([3.0, None, 1.0])
        Summary(median=2.0, minimum=1.0, maximum=3.0, num_rounds=2)
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Summary(
        statistics.median(known),
        minimum=min(known),
        maximum=max(known),
        num_rounds=len(known),
    )


def paired_ratio(
    ours: Mapping[int, float | None], theirs: Mapping[int, float | None]
) -> Summary | None:
    """Ours divided by theirs in each round, over the rounds that have both.

    The two of a round ran next to each other, so that a machine which slows down for a while
    slows down both. A round in which theirs is 0 has no ratio.

    Args:
        ours: Our value in each round.
        theirs: The peer's value in each round.

    Example:
        >>> paired_ratio({1: 2.0, 2: 30.0, 3: 1.0}, {1: 4.0, 2: 60.0, 4: 1.0}).median
        0.5
    """
    ratios: list[float] = []
    for number, value in ours.items():
        other = theirs.get(number)
        if value is not None and other:
            ratios.append(value / other)
    return summary(ratios)
