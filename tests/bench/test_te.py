import gc

import pytest
import torch

from automodel_fn import cache_counts, step_context
from automodel_fn.bench import BENCHMARKS
from automodel_fn.bench._bench_te import added_host
from automodel_fn.step._ambient import eager_step
from automodel_fn.te._patch import patch_classes
from automodel_fn.testing import te_stand_ins

BENCHMARK = BENCHMARKS["te"]


@pytest.fixture
def calls():
    return []


@pytest.fixture
def layer(calls):
    classes = te_stand_ins()

    class Linear(classes.linear):
        def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
            calls.append((is_first_microbatch, torch.is_grad_enabled(), gc.isenabled()))
            return inp

    classes.linear.forward = Linear.forward
    with patch_classes(classes, eager_step):
        made = classes.linear(2, 2)
        with step_context(first_microbatch=True):
            made(torch.ones(1, 2))
        calls.clear()
        yield made


def test_all_that_take_turns_reuse_the_weight_without_a_collector(layer, calls):
    added_host(layer, torch.ones(1, 2), rounds=3, settle=lambda: None)
    assert set(calls) == {(False, False, False), (False, False, True)}
    assert calls[-9:] == [(False, False, False)] * 9
    assert cache_counts(layer).reused == len(calls) / 3
    assert cache_counts(layer).refreshed == 0


def test_the_device_is_waited_for_before_each_timed_call(layer, calls):
    added_host(layer, torch.ones(1, 2), rounds=3, settle=lambda: calls.append("settle"))
    assert calls[-18::2] == ["settle"] * 9
    assert "settle" not in calls[-17::2]


def test_what_is_found_is_what_the_benchmark_says_that_it_measures(layer):
    found = added_host(layer, torch.ones(1, 2), rounds=3, settle=lambda: None)
    measures = [measure.name for measure in BENCHMARK.measures]
    assert measures == ["accumulate_ms", *found]
    assert all(isinstance(value, float) for value in found.values())
