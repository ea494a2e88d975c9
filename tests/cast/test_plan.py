from __future__ import annotations

import copy
import gc
import pickle

import attrs
import pytest
import torch
from torch import nn

from automodel_fn import ConfigError, Plan, apply, bf16, cast_plan, fp16, fp32, frozen_cast_plan


def make():
    return nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))


def planned(**arguments):
    return cast_plan(make(), bf16, **arguments)


def test_plans_of_equal_models_are_equal_and_hash_alike():
    assert planned() == planned()
    assert hash(planned()) == hash(planned())


@pytest.mark.parametrize(
    "other",
    [
        planned(skip="0.bias"),
        planned(keep_fp32="1"),
        cast_plan(make(), fp16),
        attrs.evolve(planned(), notes=("x",)),
    ],
)
def test_plans_that_do_something_else_are_not_equal(other):
    assert planned() != other


def test_equal_plans_do_not_differ():
    assert planned().diff(planned()) == ()


def test_diff_names_each_tensor_that_is_decided_otherwise():
    ours, theirs = planned(), planned(skip="0.bias", keep_fp32="1.weight")

    differences = ours.diff(theirs)

    assert [d.name for d in differences] == ["0.bias", "1.weight"]
    assert (differences[0].ours, differences[0].theirs) == (ours.entries[1], theirs.entries[1])
    assert str(differences[0]).startswith("0.bias: cast float32 to bfloat16 (")
    assert str(differences[0]).endswith(" -> skip float32 (skip='0.bias')")


def test_diff_has_what_one_plan_has_alone_in_the_order_of_ours_then_theirs():
    ours, theirs = planned(), cast_plan(nn.ModuleDict({"a": make(), "1": nn.LayerNorm(2)}), bf16)

    differences = ours.diff(theirs)

    assert [d.name for d in differences] == [
        "0.weight", "0.bias", "a.0.weight", "a.0.bias", "a.1.weight", "a.1.bias",
    ]  # fmt: skip
    assert [d.theirs for d in differences[:2]] == [None, None]
    assert [d.ours for d in differences[2:]] == [None] * 4


def test_diff_is_the_reverse_of_the_other_way_round():
    ours, theirs = planned(), planned(skip="0")

    forth, back = ours.diff(theirs), theirs.diff(ours)

    assert [(d.name, d.ours, d.theirs) for d in forth] == [(d.name, d.theirs, d.ours) for d in back]


def test_the_inverse_brings_every_dtype_back(zoo, tensors_of):
    before = {name: tensor.dtype for name, tensor in tensors_of(zoo).items()}
    plan = cast_plan(zoo, bf16)

    apply(plan)
    apply(plan.inverse())

    assert {name: tensor.dtype for name, tensor in tensors_of(zoo).items()} == before


def test_the_inverse_of_a_widening_plan_is_exact(state_of):
    model = make().to(bf16)
    before, plan = state_of(model), cast_plan(model, fp32)

    apply(plan)
    apply(plan.inverse())

    assert state_of(model).differences(before) == []


def test_the_inverse_has_no_single_dtype_and_says_what_it_inverts(entry_of):
    plan = planned(skip="0.bias")
    inverse = plan.inverse()

    entry = entry_of(inverse, "0.weight")
    assert inverse.dtype is None
    assert (entry.from_dtype, entry.to_dtype, entry.action) == (bf16, fp32, "cast")
    assert entry.reason == f"inverse of: {entry_of(plan, '0.weight').reason}"


def test_an_unchanged_entry_is_its_own_inverse():
    plan = planned(skip="0", keep_fp32="1")

    assert plan.inverse().entries == plan.entries


@pytest.mark.parametrize(
    "plan",
    [
        planned(keep_fp32="1", skip="0.bias"),
        cast_plan(make().to(bf16), fp16, keep_fp32="1"),
        cast_plan(make().to(bf16), fp32),
        frozen_cast_plan(make().requires_grad_(False), fp16),
        frozen_cast_plan(make(), None),
        attrs.evolve(
            planned(),
            entries=tuple(attrs.evolve(e, reason="inverse of: x") for e in planned().entries),
        ),
    ],
    ids=["cast", "pins_cast_up", "widening", "frozen", "nothing", "reason_like_an_inverse"],
)
def test_the_inverse_of_the_inverse_is_the_plan(plan):
    inverse = plan.inverse()

    assert inverse.inverse() == plan
    assert inverse.inverse().inverse() == inverse


def test_the_inverse_of_a_pin_that_was_cast_up_is_a_cast(entry_of):
    plan = cast_plan(make().to(bf16), bf16, keep_fp32="1")

    entry = entry_of(plan.inverse(), "1.weight")

    assert (entry.from_dtype, entry.to_dtype) == (fp32, bf16)
    assert (entry.action, entry.inverse_of) == ("cast", "keep")


def test_the_inverse_of_the_inverse_casts_the_same_model():
    model = make()
    plan = cast_plan(model, bf16)

    apply(plan)
    apply(plan.inverse())
    apply(plan.inverse().inverse())

    assert {p.dtype for p in model.parameters()} == {bf16}


def test_a_pin_that_is_cast_to_less_is_refused():
    entry = planned(keep_fp32="1").entries[2]

    with pytest.raises(ConfigError, match="keep float32 to bfloat16"):
        attrs.evolve(entry, to_dtype=bf16)


def test_a_plan_does_not_keep_its_model_alive():
    model = make()
    plan = cast_plan(model, bf16)
    del model
    gc.collect()

    with pytest.raises(ConfigError, match="model=None"):
        plan.model()


def test_a_plan_does_not_keep_its_optimizers_alive():
    model = make()
    plan = cast_plan(model, bf16, optimizers=[torch.optim.SGD(model.parameters(), lr=1.0)])
    gc.collect()

    assert plan.optimizer_refs.alive() == ()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_a_copied_plan_is_equal_and_has_no_model(copied):
    model = make()
    plan = cast_plan(model, bf16)

    twin = copied(plan)

    assert twin == plan
    with pytest.raises(ConfigError, match="model=None"):
        apply(twin)
    assert model[0].weight.dtype == fp32


def test_a_plan_and_its_entries_cannot_be_changed():
    plan = planned()

    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        plan.dtype = fp16
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        plan.entries[0].action = "skip"


def test_an_unknown_action_is_refused():
    with pytest.raises(ValueError, match="action"):
        attrs.evolve(planned().entries[0], action="drop")


def test_rows_put_every_entry_into_words(zoo):
    plan = cast_plan(zoo, bf16)

    rows = {row.name: row for row in plan.rows()}

    assert isinstance(plan, Plan)
    assert list(rows) == [entry.name for entry in plan.entries]
    row = rows["embed.weight"]
    assert (row.before, row.after, row.action, row.shape) == ("float32", "bfloat16", "cast", "7x4")
    assert (row.num_aliases, row.bytes_before, row.bytes_after) == (1, 7 * 4 * 4, 7 * 4 * 2)
    assert (rows["scalar"].shape, rows["empty"].bytes_before) == ("scalar", 0)
    assert rows["turn"].bytes_before == rows["turn"].bytes_after == 2 * 8
