import pytest
import torch

from automodel_fn.bench import BENCHMARKS
from automodel_fn.bench._bench_ops import OPS
from automodel_fn.bench._device_time import cuda_run, device_us
from automodel_fn.bench._ops_measure import measured_op
from automodel_fn.bench._ops_spec import CEILING, OURS, OURS_SPLIT, TORCH
from automodel_fn.bench._train_step_models import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
QUICK = [
    (op, case) for op in OPS for case in op.cases if case.device == "cuda" and case.group == "quick"
]
STEPS = [case for case in CASES if (case.device, case.group) == ("cuda", "quick")]
on_each_quick_step = pytest.mark.parametrize("case", STEPS, ids=[case.name for case in STEPS])


def test_calls_that_wait_for_nothing_are_a_graph():
    x = torch.ones(1024, device="cuda")
    out = torch.zeros_like(x)
    run = cuda_run([lambda: out.add_(x)], 8)
    out.zero_()
    run.start()
    torch.cuda.synchronize()

    assert run.is_graph
    assert out[0].item() == 8


def test_a_call_that_waits_is_made_by_python_and_nothing_else_is_spoiled():
    x = torch.ones(1024, device="cuda")

    assert not cuda_run([lambda: x.sum().item()], 8).is_graph
    assert cuda_run([lambda: x.neg()], 8).is_graph


def test_a_graph_holds_the_backward():
    x = torch.ones(1024, device="cuda", requires_grad=True)
    out = torch.zeros(1024, device="cuda")

    def step():
        out.copy_(torch.autograd.grad(x.square().sum(), x)[0])

    run = cuda_run([step], 1)
    out.zero_()
    run.start()
    torch.cuda.synchronize()

    assert run.is_graph
    assert torch.equal(out, 2 * x.detach())


def test_each_run_has_a_time():
    x = torch.ones(2**20, device="cuda")
    runs = {
        "by graph": cuda_run([lambda: x.neg()], 4),
        "by Python": cuda_run([lambda: x.sum().item()], 4),
    }
    found = device_us(runs)

    assert list(found) == list(runs)
    assert min(found.values()) > 0


@pytest.mark.parametrize(("op", "case"), QUICK, ids=[case.name for _, case in QUICK])
def test_ours_and_torchs_ways_are_measured_by_graphs(op, case):
    names = {OURS, TORCH} & set(op.ways)
    found = measured_op(op, case, [*names, CEILING])

    for name in names:
        assert found[name].problem == ""
        values, facts = dict(found[name].values), dict(found[name].facts)
        assert values["error_relative"] < 0.01
        assert values["forward_host_us"] > 0
        assert values["extra_peak_mib"] > 0
        assert facts["is_forward_by_graph"] == 1


def test_a_head_that_splits_its_weight_in_the_call_waits_and_says_so():
    (op, case), *_ = [(op, case) for op, case in QUICK if OURS_SPLIT in op.ways]
    found = measured_op(op, case, [OURS, OURS_SPLIT])

    assert dict(found[OURS].facts)["is_forward_by_graph"] == 1
    assert dict(found[OURS_SPLIT].facts)["is_forward_by_graph"] == 0


def step_by(name, case):
    (subject,) = [s for s in BENCHMARKS["train-step"].subjects if s.name == name]
    return subject.measure(case)


@on_each_quick_step
def test_a_step_of_ours_is_measured_and_has_the_losses_of_the_plain_model(case):
    found = step_by("automodel_fn", case)

    values = dict(found.values)
    assert values["step_ms"] >= values["host_ms"] > 0
    assert 0 < values["peak_gib"] < case.needed_bytes / 2**30
    assert dict(found.facts) == {"is_loss_of_plain": 1, "is_weight_kept": None}


@on_each_quick_step
@pytest.mark.usefixtures("classes")
@pytest.mark.filterwarnings("ignore")  # Transformer Engine warns of much that is not ours
def test_a_step_in_fp8_keeps_its_weights_and_has_nearly_the_losses_of_the_plain_model(case):
    found = step_by("automodel_fn, FP8", case)

    assert dict(found.values)["loss_distance_relative"] < 0.01
    assert dict(found.facts)["is_weight_kept"] == 1


@on_each_quick_step
def test_a_step_of_the_plain_model_is_measured(case):
    found = step_by("Hugging Face", case)

    assert found.problem == ""
    assert dict(found.values)["step_ms"] > 0
    assert dict(found.facts)["is_loss_of_plain"] is None
