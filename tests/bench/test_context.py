import time

import pytest

from automodel_fn.bench import BENCHMARKS
from automodel_fn.bench._loops import interleaved_ns, median_difference, median_ratio

BENCHMARK = BENCHMARKS["context"]
OURS, RAW, NEMO = BENCHMARK.subjects
(QUICK,) = [case for case in BENCHMARK.cases if case.group == "quick"]


def values(subject):
    return dict(subject.measure(QUICK).values)


def test_ours_is_measured_in_everything_and_enters_within_its_bound():
    found = values(OURS)
    assert all(found[measure.name] is not None for measure in BENCHMARK.measures)
    assert dict(OURS.measure(QUICK).facts) == {"is_within_raw": 1}
    assert found["read_ns"] < found["enter_ns"]


def test_a_raw_set_and_reset_is_the_unit():
    found = values(RAW)
    assert 0.5 < found["enter_per_raw"] < 2
    assert found["forward_ns"] is found["forward_off_ns"] is None


def test_loops_take_turns_and_each_is_run_once_before():
    seen = []
    loops = {"a": lambda calls: seen.append(("a", calls)), "b": lambda calls: seen.append("b")}
    found = interleaved_ns(loops, calls=3, rounds=2)
    assert seen == [("a", 3), "b"] * 3
    assert {name: len(times) for name, times in found.items()} == {"a": 2, "b": 2}


def test_times_are_those_of_a_call():
    found = interleaved_ns({"nap": lambda calls: time.sleep(0.002 * calls)}, calls=5, rounds=1)
    assert found["nap"][0] == pytest.approx(2e6, rel=0.5)


def test_medians_are_of_the_turns():
    assert median_difference([5.0, 50.0, 7.0], [1.0, 40.0, 1.0]) == 6.0
    assert median_ratio([4.0, 90.0, 6.0], [2.0, 30.0, 3.0]) == 2.0
