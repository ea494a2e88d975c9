import gc

import pytest
import torch

from automodel_fn import StepContext, cache_counts, current_step, step_context
from automodel_fn.bench import BENCHMARKS, _te_host
from automodel_fn.bench._te_host import added_host
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


def test_of_the_forwards_that_take_turns_each_is_given_what_its_name_says(layer, calls):
    added_host(layer, torch.ones(1, 2), rounds=3, settle=lambda: None)
    later, off = [call[0] for call in calls[: 4 * 55]], [call[0] for call in calls[4 * 55 :]]
    assert (later.count(False), later.count(None)) == (3 * 55, 55)
    assert (off.count(False), off.count(None)) == (55, 2 * 55)


def test_the_patched_forward_reuses_the_weight_in_the_scope_and_is_not_asked_outside(layer, calls):
    added_host(layer, torch.ones(1, 2), rounds=3, settle=lambda: None)
    counts = cache_counts(layer)
    assert (counts.filled, counts.refreshed, counts.repeated) == (1, 0, 0)
    assert 7 * counts.reused == len(calls)


def test_no_forward_has_gradients_and_no_timed_one_a_collector(layer, calls):
    added_host(layer, torch.ones(1, 2), rounds=3, settle=lambda: None)
    assert {has_gradients for _, has_gradients, _ in calls} == {False}
    assert {has_collector for _, _, has_collector in calls[-9:]} == {False}


def test_the_device_is_waited_for_before_each_timed_call(layer, calls):
    added_host(layer, torch.ones(1, 2), rounds=3, settle=lambda: calls.append("settle"))
    assert calls[-18::2] == ["settle"] * 9
    assert "settle" not in calls[-17::2]


def test_what_the_patch_adds_is_measured_against_both_ways_to_call_the_forward(layer, monkeypatch):
    scopes = []

    def measured(loops, *, calls, rounds, settle):
        is_off = current_step() == StepContext()
        scopes.append(current_step().first_microbatch)
        times = {"own": 100e3, "again": 101e3, "plain": 200e3, "patched": 110e3 + is_off * 94e3}
        return {name: [times[name]] * rounds for name in loops}

    monkeypatch.setattr(_te_host, "interleaved_ns", measured)
    found = added_host(layer, torch.ones(1, 2), rounds=3, settle=lambda: None)
    assert {name: round(value, 6) for name, value in found.items()} == {
        "host_us": 100,
        "added_host_us": 10,
        "added_host_percent": 10,
        "host_noise_percent": 1,
        "plain_host_us": 200,
        "added_to_plain_percent": -45,
        "off_added_host_us": 4,
        "off_added_host_percent": 2,
    }
    assert scopes == [False, False, None, None]


def test_what_is_found_is_what_the_benchmark_says_that_it_measures(layer):
    found = added_host(layer, torch.ones(1, 2), rounds=3, settle=lambda: None)
    measures = [measure.name for measure in BENCHMARK.measures]
    assert measures == ["accumulate_ms", *found]
    assert all(isinstance(value, float) for value in found.values())


def test_what_ours_promises_is_of_what_is_measured_and_of_subjects_and_cases_that_there_are():
    ours = next(subject for subject in BENCHMARK.subjects if subject.name == BENCHMARK.ours)
    names = {subject.name for subject in BENCHMARK.subjects}
    cases = {case.name for case in BENCHMARK.cases}
    assert [(p.measure, p.peer) for p in ours.promises] == [
        ("accumulate_ms", "te.Linear, not cached"),
        ("accumulate_ms", "nn.Linear, bf16"),
        ("added_to_plain_percent", ""),
    ]
    assert {p.peer for p in ours.promises} <= {*names, ""}
    assert {case for p in ours.promises for case in p.cases} <= cases
