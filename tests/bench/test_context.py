import itertools
from collections import Counter
from contextvars import copy_context

import pytest

from automodel_fn import step_context
from automodel_fn.bench import BENCHMARKS, _bench_context, _context_subjects, _loops
from automodel_fn.bench._context_subjects import raw_enters
from automodel_fn.bench._loops import interleaved_ns, median_difference, median_ratio

BENCHMARK = BENCHMARKS["context"]
OURS, RAW, NEMO = BENCHMARK.subjects
(QUICK,) = [case for case in BENCHMARK.cases if case.group == "quick"]


def values(subject):
    return dict(subject.measure(QUICK).values)


def test_ours_is_measured_in_everything():
    found = values(OURS)
    assert all(found[measure.name] is not None for measure in BENCHMARK.measures)


def test_a_raw_set_and_reset_reads_in_no_forward():
    found = values(RAW)
    assert found["enter_per_raw"] is not None
    assert found["forward_ns"] is found["forward_off_ns"] is None


@pytest.mark.parametrize(("enter", "is_within"), [(15.0, 1), (15.1, 0)])
def test_entering_may_take_15_times_a_raw_set_and_reset(monkeypatch, enter, is_within):
    def measured(loops, *, calls, rounds):
        return {name: [{"enter": enter, "empty": 0.0}.get(name, 1.0)] for name in loops}

    monkeypatch.setattr(_bench_context, "interleaved_ns", measured)
    found = OURS.measure(QUICK)

    assert dict(found.values)["enter_per_raw"] == enter
    assert dict(found.facts) == {"is_within_raw": is_within}


def test_the_raw_variable_is_alone_in_its_context(monkeypatch):
    class Variable:
        def __init__(self):
            self.beside = []

        def set(self, _):
            self.beside.append(len(copy_context()))

        def reset(self, _):
            pass

    variable = Variable()
    monkeypatch.setattr(_context_subjects, "_raw", variable)
    with step_context(first_microbatch=True):
        raw_enters(2)

    assert variable.beside == [0, 0]


def test_loops_take_turns_and_each_is_run_once_before():
    seen = []
    loops = {"a": lambda calls: seen.append(("a", calls)), "b": lambda calls: seen.append("b")}
    found = interleaved_ns(loops, calls=3, rounds=2)
    assert seen[:2] == [("a", 3), "b"]
    assert [set(seen[2:4]), set(seen[4:])] == [{("a", 3), "b"}] * 2
    assert {name: len(times) for name, times in found.items()} == {"a": 2, "b": 2}


def order_of(names, rounds):
    order = []
    loops = {name: lambda _, name=name: order.append(name) for name in names}
    interleaved_ns(loops, calls=1, rounds=rounds)
    return order[len(names) :]


@pytest.mark.parametrize("names", ["abc", "abcd"])
def test_each_loop_follows_each_other_one_about_as_often_in_an_order_that_recurs(names):
    order = order_of(names, 1000)
    follows = Counter(pair for pair in itertools.pairwise(order) if pair[0] != pair[1])
    assert len(follows) == len(names) * (len(names) - 1)
    assert max(follows.values()) < 1.25 * min(follows.values())
    assert order_of(names, 1000) == order


def test_what_settles_before_a_loop_is_not_timed(monkeypatch):
    clock = itertools.count(step=1000)
    monkeypatch.setattr(_loops.time, "perf_counter_ns", lambda: next(clock))
    found = interleaved_ns({"a": lambda _: None}, calls=1, rounds=2, settle=lambda: next(clock))
    assert found == {"a": [1000.0, 1000.0]}


def test_times_are_those_of_a_call(monkeypatch):
    clock = itertools.count(step=1000)
    monkeypatch.setattr(_loops.time, "perf_counter_ns", lambda: next(clock))
    found = interleaved_ns({"a": lambda calls: None}, calls=5, rounds=2)
    assert found == {"a": [200.0, 200.0]}


def test_medians_are_of_the_turns():
    assert median_difference([5.0, 50.0, 7.0], [1.0, 40.0, 1.0]) == 6.0
    assert median_ratio([4.0, 90.0, 6.0], [2.0, 30.0, 3.0]) == 2.0
