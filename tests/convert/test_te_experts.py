"""Experts multiplied by Transformer Engine's GroupedLinear, which quantizes weights by the step."""

import copy
import gc
import weakref

import attrs
import pytest
import torch
from convert_families import (
    OWN,
    assert_close,
    batch_of,
    experts_of,
    loss_logits_and_gradients,
    small_model,
)
from torch import nn

from automodel_fn import (
    BackendUnavailableError,
    apply,
    backend_plan,
    cache_counts,
    invalidate,
    step_context,
)


@pytest.fixture
def model(classes, planned):
    model = small_model("qwen3_moe")
    apply(planned(model, "te"))
    return model


def grouped(model):
    return [made for each in experts_of(model) for made in each._automodel_fn_product.modules()]


def test_weights_are_quantized_once_an_optimizer_step(model):
    batch = batch_of("qwen3_moe")
    for first in (True, False, False):
        with step_context(first_microbatch=first):
            model(**batch).loss.backward()

    assert [made.num_quantizations for made in grouped(model)] == [4] * 4
    counts = cache_counts(model)
    assert (counts.filled, counts.reused, counts.refreshed) == (4, 8, 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda experts: (experts.gate_up_proj.data.mul_(2), invalidate(experts)),
        lambda experts: nn.init.normal_(experts.gate_up_proj),
        lambda experts: setattr(
            experts, "gate_up_proj", nn.Parameter(torch.randn_like(experts.gate_up_proj))
        ),
        lambda experts: setattr(
            experts.gate_up_proj, "data", torch.randn_like(experts.gate_up_proj)
        ),
    ],
)
def test_a_changed_weight_is_quantized_anew(model, change):
    batch = batch_of("qwen3_moe")
    with step_context(first_microbatch=True):
        model(**batch)
    change(experts_of(model)[0])
    with step_context(first_microbatch=False):
        found = model(**batch).logits

    assert cache_counts(model).refreshed
    assert torch.equal(found, model(**batch).logits)


def test_an_optimizer_step_is_noticed(model):
    batch = batch_of("qwen3_moe")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with step_context(first_microbatch=True):
        model(**batch).loss.backward()
    optimizer.step()
    with step_context(first_microbatch=False):
        found = model(**batch).logits

    assert torch.equal(found, model(**batch).logits)


def test_gradients_add_up_over_microbatches(model):
    batches = [batch_of("qwen3_moe", seed) for seed in range(3)]
    alone = []
    for batch in batches:
        model(**batch).loss.backward()
        alone.append([e.gate_up_proj.grad.clone() for e in experts_of(model)])
        model.zero_grad(set_to_none=True)
    for index, batch in enumerate(batches):
        with step_context(first_microbatch=index == 0):
            model(**batch).loss.backward()

    for experts, *parts in zip(experts_of(model), *alone, strict=True):
        torch.testing.assert_close(experts.gate_up_proj.grad, sum(parts))


def test_each_expert_gets_a_multiple_of_16_rows(model, classes, monkeypatch):
    seen, own = [], classes.grouped_linear.forward

    def forward(self, inp, m_splits, is_first_microbatch=None):
        seen.append((len(inp), list(m_splits)))
        return own(self, inp, m_splits, is_first_microbatch)

    monkeypatch.setattr(classes.grouped_linear, "forward", forward)
    experts = experts_of(model)[0]
    chosen = torch.tensor([[0, 3]] * 16 + [[3, 1]])
    experts(torch.randn(17, 32), chosen, torch.rand(17, 2))

    assert seen == [(64, [16, 16, 0, 32])] * 2


def test_what_fills_up_changes_neither_results_nor_gradients(exact, model, planned):
    other = small_model("qwen3_moe")
    apply(planned(other, "torch_mm"))
    batch = batch_of("qwen3_moe")
    found, expected = (loss_logits_and_gradients(each, batch) for each in (model, other))

    assert_close(found[1], expected[1], 1e-5)
    for name, gradient in expected[2].items():
        assert_close(found[2][name], gradient, 1e-5)


def test_a_forward_keeps_no_graph(model):
    experts = experts_of(model)[0]
    x = torch.randn(9, 32).requires_grad_()
    kept = x * 1
    gone = weakref.ref(kept)
    experts(kept, torch.rand(9, 4).topk(2).indices, torch.rand(9, 2))
    del kept
    gc.collect()

    assert gone() is None
    for made in grouped(model):
        assert not [name for name in vars(made) if name.startswith("weight")]


def test_copies_have_modules_of_their_own(model):
    batch = batch_of("qwen3_moe")
    expected = model(**batch).logits
    again = copy.deepcopy(model)

    assert grouped(again) == []
    assert torch.equal(again(**batch).logits, expected)
    assert not set(grouped(again)) & set(grouped(model))


def test_after_a_cast_there_are_new_ones_in_the_place_of_the_old_ones(model):
    batch = batch_of("qwen3_moe")
    model(**batch)
    before = set(grouped(model))
    model(**batch)
    assert set(grouped(model)) == before
    model.bfloat16()
    model(**batch)

    assert len(grouped(model)) == len(before)
    assert not set(grouped(model)) & before


def test_they_are_no_parts_of_the_model(model):
    before = dict(model.named_modules())
    model(**batch_of("qwen3_moe"))

    assert dict(model.named_modules()) == before


def test_on_meta_shapes_are_known(classes, planned):
    with torch.device("meta"):
        model = small_model("qwen3_moe")
    apply(planned(model, "te"))
    experts = experts_of(model)[0]
    x = torch.empty(5, 32, device="meta")
    chosen = torch.empty(5, 2, dtype=torch.int64, device="meta")

    assert experts(x, chosen, torch.empty(5, 2, device="meta")).shape == (5, 32)


@pytest.mark.parametrize("size", [24, 32])
def test_sizes_that_fp8_cannot_have_are_left_alone(classes, machine, size):
    model = small_model("qwen3_moe", moe_intermediate_size=size)
    asked = attrs.evolve(OWN, experts="te", te_fp8="current")
    if size == 24:
        with pytest.raises(BackendUnavailableError, match=r"experts='te': .* down_proj=24 is no"):
            backend_plan(model, asked, availability=machine)
        asked = attrs.evolve(asked, linear="te")
        model = nn.ModuleList([model, small_model("qwen3_moe", moe_intermediate_size=32)])
    plan = backend_plan(model, asked, availability=machine)
    found = [e.reason for e in plan.entries if e.field == "grouped_experts"]

    if size == 24:
        unfit = "a size of down_proj=24 is no multiple of 16, as FP8 needs"
        assert found[:2] == [unfit, unfit]
    assert set(found[-2:]) == {"as asked, in the place of transformers' own forward"}
    if size == 32:
        blocks = {e.name for e in plan.entries if e.field == "te_fp8" and e.changes}
        assert blocks == {"", "model.layers.0", "model.layers.1"}
