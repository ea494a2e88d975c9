import itertools
from types import SimpleNamespace

import pytest

from automodel_fn.bench import _device_time as device_time
from automodel_fn.bench._device_time import calls_a_run, host_us


@pytest.fixture
def clock(monkeypatch):
    """A clock on which everything takes 1 us, and as many turns as are asked for."""

    def use(turns):
        ticks = itertools.count(step=1000)
        stand_in = SimpleNamespace(perf_counter_ns=lambda: next(ticks), perf_counter=lambda: 0.0)
        monkeypatch.setattr(device_time, "time", stand_in)
        monkeypatch.setattr(device_time, "_MOST", turns)

    return use


def test_a_run_is_long_and_takes_every_set_equally_often():
    for num_bytes, num_sets in ((67_000_000, 3), (16_000_000, 7), (1000, 5)):
        calls = calls_a_run(num_bytes, num_sets)

        assert calls % num_sets == 0
        assert calls * num_bytes >= 2e9 or calls >= 512


def test_a_call_of_gigabytes_is_made_once():
    assert calls_a_run(3_000_000_000, 1) == 1


def test_those_compared_take_turns_at_being_first_and_each_at_its_buffers(clock):
    clock(turns=4)
    seen = []
    calls = {
        name: [lambda name=name, index=index: seen.append((name, index)) for index in range(2)]
        for name in "ab"
    }
    found = host_us(calls, "cpu")

    assert seen == [(name, turn % 2) for turn in range(4) for name in ("ab", "ba")[turn % 2]]
    assert found == {"a": 1.0, "b": 1.0}


def test_slow_calls_have_few_turns(monkeypatch):
    seconds = itertools.count(step=2)
    monkeypatch.setattr(device_time.time, "perf_counter", lambda: next(seconds))

    assert list(device_time._turns()) == [0, 1, 2, 3, 4]
