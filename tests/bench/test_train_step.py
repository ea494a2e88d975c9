import math
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from automodel_fn import current_step
from automodel_fn.bench import BENCHMARKS
from automodel_fn.bench._bench_train_step import CASES
from automodel_fn.bench._spec import matches_any
from automodel_fn.bench._train_step_measure import Training, agree, measured_step, training_of
from automodel_fn.bench._train_step_models import built_model, is_mixture
from automodel_fn.bench._train_step_text import ids_by_rank, prose, text_batches
from automodel_fn.bench._train_step_ways import OURS, PLAIN, Way, our_backend
from automodel_fn.convert._planner import backend_plan

BENCHMARK = BENCHMARKS["train-step"]
QUICK = [case for case in CASES if (case.device, case.group) == ("cpu", "quick")]
SUBJECTS = {subject.name: subject for subject in BENCHMARK.subjects}
(LLAMA, MOE) = QUICK
on_each_quick_case = pytest.mark.parametrize("case", QUICK, ids=[case.name for case in QUICK])


def subjects_of(case):
    return [s.name for s in BENCHMARK.subjects if matches_any(case.name, s.cases)]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def measured(name, case):
    subject = SUBJECTS[name]
    try:
        subject.load()
    except ImportError as error:
        pytest.skip(str(error))
    return subject.measure(case)


@on_each_quick_case
def test_ours_is_measured_and_has_the_losses_of_the_plain_model(case):
    found = measured("automodel_fn", case)

    values = dict(found.values)
    assert list(values) == [measure.name for measure in BENCHMARK.measures]
    assert values["step_ms"] > 0
    tokens = case.parameter("tokens") * case.parameter("microbatches")
    assert values["throughput_tps"] == pytest.approx(tokens / values["step_ms"] * 1e3)
    assert values["peak_gib"] is None
    assert values["host_ms"] is None
    assert values["loss_distance_relative"] < 1e-3
    assert dict(found.facts) == {"is_loss_of_plain": 1, "is_weight_kept": None}


@on_each_quick_case
def test_the_plain_model_has_nothing_to_be_compared_with(case):
    found = measured("Hugging Face", case)

    values = dict(found.values)
    assert values["loss_distance_relative"] is None
    assert dict(found.facts) == {"is_loss_of_plain": None, "is_weight_kept": None}
    assert values["first_loss_nats"] == pytest.approx(math.log(case.parameter("vocabulary")), 0.1)


# What warns here is the peers' code, and PyTorch's compiler.
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, id=f"{name}-{case.name}")
        for case in QUICK
        for name in subjects_of(case)
        if name not in ("automodel_fn", "Hugging Face")
    ],
)
def test_every_peer_that_runs_on_a_cpu_trains_the_same_model(name, case):
    found = measured(name, case)

    assert found.problem == ""
    assert dict(found.values)["step_ms"] > 0
    assert dict(found.facts)["is_loss_of_plain"] == 1


def test_on_a_cpu_there_is_a_peer_for_each_kind_of_model():
    assert subjects_of(LLAMA) == [
        "automodel_fn",
        "Hugging Face",
        "Hugging Face, compiled",
        "NeMo Automodel",
    ]
    assert subjects_of(MOE) == ["automodel_fn", "Hugging Face", "Hugging Face, compiled"]


@on_each_quick_case
def test_ours_is_the_same_weights_by_another_backend(case):
    plain, ours = built_model(case), OURS.prepare(case)

    assert list(plain.state_dict()) == list(ours.state_dict())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
        assert tensor.dtype == torch.bfloat16, name
    entries = backend_plan(plain, our_backend(case)).entries
    expected = {
        ("loss", "fused"),
        ("rope_fusion", "True"),
        ("async_masks", "True"),
        ("rms_norm", "torch_fp32"),
    }
    # The loop over experts, which a CPU runs, has a gate of its own.
    expected.add(("experts", "torch") if is_mixture(case) else ("swiglu", "recomputed"))
    assert {(entry.field, entry.after) for entry in entries if entry.changes} == expected
    assert not any(entry.changes for entry in backend_plan(ours, our_backend(case)).entries)


def failing(case):
    raise ValueError("no such kernel\nand much more")


def test_a_peer_that_fails_is_a_problem_and_ours_that_fails_ends_the_run():
    found = measured_step(Way(failing), False, LLAMA)

    assert found.values == ()
    assert found.problem == "it raised ValueError: no such kernel"
    with pytest.raises(ValueError, match="no such kernel"):
        measured_step(Way(failing), True, LLAMA)


def test_what_a_way_needs_is_imported_before_any_model_runs():
    def load():
        raise ImportError("nothing is here")

    def never(case):
        raise AssertionError

    found = measured_step(Way(never, load=load), False, LLAMA)

    assert found.problem == "it raised ImportError: nothing is here"


def test_losses_that_differ_show():
    def other_weights(case):
        model = built_model(case)
        nn.init.normal_(model.lm_head.weight, std=1.0)
        return model

    found = measured_step(Way(other_weights), False, LLAMA)

    assert dict(found.facts)["is_loss_of_plain"] == 0
    assert dict(found.values)["loss_distance_relative"] > 0.01


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.steps = []

    def forward(self, input_ids, labels, use_cache, num_items_in_batch):
        assert input_ids is labels
        self.steps.append((current_step(), self.weight.item()))
        loss = self.weight * labels[:, 1:].sum() / num_items_in_batch
        return type("Out", (), {"loss": loss})


def training(way, batches):
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return model, Training(model, way=way, optimizer=optimizer, batches=batches, num_microbatches=2)


@pytest.mark.parametrize("way", [OURS, PLAIN])
def test_a_step_adds_up_the_gradients_of_its_microbatches(way):
    batches = [torch.tensor([[100.0, n]]) for n in (1, 3, 5, 7)]
    model, made = training(way, batches)

    assert [loss.item() for loss in made.step(0)] == [2.0, 6.0]
    assert model.weight.item() == 0.0  # 2 - (1 + 3) / 2
    made.step(1)
    assert model.weight.item() == -6.0
    assert model.weight.grad is None
    assert [weight for _, weight in model.steps] == [2.0, 2.0, 0.0, 0.0]


def test_only_ours_is_in_a_step_context():
    batches = [torch.ones(1, 2)] * 2
    (ours, made), (plain, made_plain) = training(OURS, batches), training(PLAIN, batches)
    made.step(0)
    made_plain.step(0)

    assert [(s.first_microbatch, s.optim_step) for s, _ in ours.steps] == [
        (True, False),
        (False, True),
    ]
    assert {s.first_microbatch for s, _ in plain.steps} == {None}


def test_the_scope_of_a_way_holds_forward_and_backward():
    open_now, seen = [], []

    class Noting(nullcontext):
        def __enter__(self):
            open_now.append(1)

        def __exit__(self, *_):
            open_now.clear()

    model, made = training(Way(built_model, scope=lambda step: Noting()), [torch.ones(1, 1)] * 2)
    model.weight.register_hook(lambda grad: seen.append(len(open_now)))
    made.step(0)

    assert seen == [1, 1]


@on_each_quick_case
def test_there_is_text_for_every_step(case):
    made = training_of(PLAIN, case)

    steps = case.parameter("loss_steps") + 3 + case.parameter("timed_steps")
    assert len(made.batches) == steps * case.parameter("microbatches")
    assert {tuple(batch.shape) for batch in made.batches} == {(1, case.parameter("tokens"))}


def test_every_case_has_something_to_do():
    for case in CASES:
        assert case.parameter("loss_steps") or case.parameter("timed_steps"), case.name


def test_numbers_of_words_are_ranks_of_their_frequency():
    text = "to be, or not to be: that is the question. To be is to do"
    ids = ids_by_rank(text, 100)
    counts = Counter(ids)

    assert sorted(counts) == list(range(len(counts)))
    frequencies = [counts[rank] for rank in range(len(counts))]
    assert frequencies == sorted(frequencies, reverse=True)
    assert ids[0] == ids[5] == 1  # "to", after "be" by the alphabet
    assert ids[1] == ids[6] == 0


@pytest.mark.parametrize("vocabulary", [1, 2, 50, 1024, 128256])
def test_numbers_of_words_stay_below_the_vocabulary(vocabulary):
    ids = ids_by_rank(prose(), vocabulary)

    assert len(ids) > 50_000
    assert max(ids) < vocabulary
    assert min(ids) == 0


def test_the_text_goes_on_from_batch_to_batch_and_begins_again_at_its_end():
    ids = ids_by_rank(prose(), 1024)
    num_batches = len(ids) // 1000 + 2
    batches = text_batches(num_batches, 1000, 1024, "cpu")

    assert len(batches) == num_batches
    joined = torch.cat([batch[0] for batch in batches]).tolist()
    assert joined == [*ids, *ids][: len(joined)]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (9.996, 10.0, True),
        (10.04, 10.0, True),
        (10.06, 10.0, False),
        (0.12349, 0.123, True),
        (0.1236, 0.123, False),
        (123.4, 123.0, True),
        (124.0, 123.0, False),
        (math.nan, 1.0, False),
    ],
)
def test_agreement_to_three_digits_is_half_of_the_third(one, other, expected):
    assert agree(one, other, 3) is expected


def test_bounds_are_promised_of_the_large_llama_alone():
    promised = {s.name: s.promises for s in BENCHMARK.subjects if s.promises}

    assert list(promised) == ["automodel_fn", "automodel_fn, FP8"]
    measures = {measure.name for measure in BENCHMARK.measures}
    for promises in promised.values():
        for promise in promises:
            assert promise.measure in measures
            assert promise.cases == ("llama",)
            assert promise.peer in ("", "Hugging Face")
