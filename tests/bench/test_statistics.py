import random

import pytest

from automodel_fn.bench._statistics import Summary, paired_ratio, summary


def slow_median(values):
    ordered = sorted(values)
    while len(ordered) > 2:
        ordered = ordered[1:-1]
    return sum(ordered) / len(ordered)


def slow_ratios(ours, theirs):
    found = []
    for number in range(1, 100):
        both = ours.get(number) is not None and theirs.get(number) is not None
        if both and theirs[number] != 0:
            found.append(ours[number] / theirs[number])
    return found


def some_rounds(generator):
    numbers = generator.sample(range(1, 12), generator.randrange(12 - 1))
    choices = (None, 0.0, generator.uniform(1e-3, 1e3), generator.uniform(1e-3, 1e3))
    return {number: generator.choice(choices) for number in numbers}


@pytest.mark.parametrize("seed", range(200))
def test_ratios_are_those_of_the_rounds_that_have_both(seed):
    generator = random.Random(seed)
    ours, theirs = some_rounds(generator), some_rounds(generator)

    expected = slow_ratios(ours, theirs)
    found = paired_ratio(ours, theirs)

    if not expected:
        assert found is None
        return
    assert found == Summary(
        pytest.approx(slow_median(expected)),
        minimum=min(expected),
        maximum=max(expected),
        num_rounds=len(expected),
    )


@pytest.mark.parametrize("seed", range(50))
def test_a_summary_is_median_least_and_most_of_what_was_measured(seed):
    values = list(some_rounds(random.Random(seed)).values())
    known = [value for value in values if value is not None]

    found = summary(values)

    if not known:
        assert found is None
        return
    assert (found.median, found.minimum, found.maximum, found.num_rounds) == (
        pytest.approx(slow_median(known)),
        min(known),
        max(known),
        len(known),
    )


def test_a_slow_round_slows_both_and_leaves_the_ratio():
    ours, theirs = {1: 2.0, 2: 200.0, 3: 2.0}, {1: 1.0, 2: 100.0, 3: 1.0}

    assert paired_ratio(ours, theirs) == Summary(2.0, minimum=2.0, maximum=2.0, num_rounds=3)


def test_nothing_measured_has_no_summary_and_no_ratio():
    assert summary([None, None]) is None
    assert paired_ratio({1: None}, {1: 1.0}) is None
    assert paired_ratio({1: 1.0}, {1: 0.0}) is None
    assert paired_ratio({1: 1.0}, {2: 1.0}) is None
