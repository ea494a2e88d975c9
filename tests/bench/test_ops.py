from functools import partial

import attrs
import pytest
import torch

from automodel_fn.bench import BENCHMARKS
from automodel_fn.bench._bench_ops import OPS
from automodel_fn.bench._ops_measure import measured_op
from automodel_fn.bench._ops_spec import CEILING, OURS, TORCH, by_autograd, copies

BENCHMARK = BENCHMARKS["ops"]
QUICK = [(op, case) for op in OPS for case in op.cases if case.group == "quick"]
on_each_quick_case = pytest.mark.parametrize(
    ("op", "case"), QUICK, ids=[f"{case.device}-{case.name}" for _, case in QUICK]
)
(SMALL_OP, SMALL), *_ = [(op, case) for op, case in QUICK if case.device == "cpu"]


@pytest.fixture(autouse=True)
def few_turns(monkeypatch):
    monkeypatch.setattr("automodel_fn.bench._device_time._MOST", 2)


def can_load(name):
    (subject,) = [subject for subject in BENCHMARK.subjects if subject.name == name]
    try:
        subject.load()
    except ImportError:
        return False
    return True


def on_cpu(case):
    return attrs.evolve(case, device="cpu")


def test_the_copy_kernel_moves_as_many_bytes_as_the_case_says_and_no_zeros():
    made = copies(SMALL, 2)

    for name, calls in (("forward_bytes", made.forwards), ("forward_backward_bytes", made.both)):
        first, second = (call() for call in calls)
        assert 2 * first.numel() * first.element_size() == SMALL.parameter(name)
        assert (first == 0).double().mean() < 1e-3
        assert first.data_ptr() != second.data_ptr()


@on_each_quick_case
def test_ours_and_torchs_way_compute_what_is_exact(op, case):
    names = [name for name in op.ways if name.startswith((OURS, TORCH)) and can_load(name)]
    found = measured_op(op, on_cpu(case), [*names, CEILING])

    assert list(found) == [*names, CEILING]
    for name in names:
        assert found[name].problem == ""
        values = dict(found[name].values)
        assert 0 <= values["error_relative"] < 0.01
        assert 0 <= values["gradient_error_relative"] < 0.02


@on_each_quick_case
def test_percents_are_of_the_ceiling_of_the_same_turns(op, case):
    found = {n: dict(m.values) for n, m in measured_op(op, on_cpu(case), [OURS, CEILING]).items()}

    for what in ("forward", "forward_backward"):
        expected = 100 * found[CEILING][f"{what}_us"] / found[OURS][f"{what}_us"]
        assert found[OURS][f"{what}_percent"] == pytest.approx(expected)
        assert found[CEILING][f"{what}_percent"] is None


def test_everything_measured_is_a_measure_of_the_benchmark():
    names = {measure.name for measure in BENCHMARK.measures}
    found = measured_op(SMALL_OP, SMALL, [OURS, CEILING])

    assert {name for name, _ in found[OURS].values} == names
    assert {name for name, _ in found[CEILING].values} < names


def test_on_a_cpu_there_is_one_time_and_no_graph():
    found = measured_op(SMALL_OP, SMALL, [OURS])[OURS]

    assert dict(found.values)["forward_host_us"] is None
    assert dict(found.facts) == {"is_forward_by_graph": None, "is_forward_backward_by_graph": None}


def failing(*_):
    raise ValueError("no such shape")


def test_a_peer_that_raises_is_a_problem_and_the_others_are_measured():
    op = attrs.evolve(SMALL_OP, ways={**SMALL_OP.ways, TORCH: failing})
    found = measured_op(op, SMALL, [TORCH, OURS])

    assert found[TORCH].problem == "it raised ValueError: no such shape"
    assert found[TORCH].values == ()
    assert dict(found[OURS].values)["forward_us"] > 0


def test_ours_that_raises_ends_the_run():
    op = attrs.evolve(SMALL_OP, ways={OURS: failing})

    with pytest.raises(ValueError, match="no such shape"):
        measured_op(op, SMALL, [OURS])


class OverwritesGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad.mul_(2), None


def test_a_peer_that_writes_into_gradients_spoils_no_error_of_the_next():
    ways = {TORCH: lambda *tensors: partial(OverwritesGradient.apply, *tensors)}
    op = attrs.evolve(SMALL_OP, ways={**ways, OURS: SMALL_OP.ways[OURS]})
    found = {n: dict(m.values) for n, m in measured_op(op, SMALL, [TORCH, OURS]).items()}

    assert found[OURS]["gradient_error_relative"] < 0.01


def test_a_peer_that_writes_into_its_inputs_spoils_no_error_of_the_next():
    ways = {TORCH: lambda x, weight: lambda: x.detach().mul_(0) * x * weight}
    op = attrs.evolve(SMALL_OP, ways={**ways, OURS: SMALL_OP.ways[OURS]})
    found = {n: dict(m.values) for n, m in measured_op(op, SMALL, [TORCH, OURS]).items()}

    assert found[OURS]["error_relative"] < 0.01


def test_a_wrong_result_shows_as_an_error():
    op = attrs.evolve(SMALL_OP, exact=by_autograd(lambda x, weight: 2 * x * weight))
    found = dict(measured_op(op, SMALL, [OURS])[OURS].values)

    assert found["error_relative"] > 0.1
    assert found["gradient_error_relative"] > 0.1


def test_a_subject_is_for_the_cases_that_it_has_a_way_for():
    for subject in BENCHMARK.subjects:
        expected = {
            case.name
            for op in OPS
            for case in op.cases
            if subject.name == CEILING or subject.name in op.ways
        }
        assert set(subject.cases) == expected, subject.name
        assert expected, subject.name


def test_every_way_is_a_subject():
    assert {name for op in OPS for name in op.ways} | {CEILING} == {
        subject.name for subject in BENCHMARK.subjects
    }


def test_a_case_says_what_it_reads_and_writes():
    for case in BENCHMARK.cases:
        assert 0 < case.parameter("forward_bytes") < case.parameter("forward_backward_bytes")
        assert case.batch


def test_inputs_differ_from_set_to_set():
    generator = torch.Generator().manual_seed(0)
    first, second = (SMALL_OP.inputs(SMALL, generator).tensors[0] for _ in range(2))

    assert not torch.equal(first, second)
