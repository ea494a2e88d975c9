from __future__ import annotations

import json

import attrs
import pytest
import torch
from torch import nn

from automodel_fn import CastPlan, ConfigError, StalePlanError, apply, audit, bf16, cast_plan, fp16


def make():
    model = nn.ModuleDict({"mlp": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    model.register_buffer("table", torch.ones(2))
    return model


def test_a_plan_applied_twice_is_stale(state_of):
    model = nn.Linear(2, 2)
    plan = cast_plan(model, bf16)
    apply(plan)
    before = state_of(model)

    with pytest.raises(
        StalePlanError, match=r"2 differences[\s\S]*weight: dtype[\s\S]*bias: dtype"
    ):
        apply(plan)
    assert state_of(model).differences(before) == []


def freeze(model):
    model["mlp"].bias.requires_grad_(False)


def reshape(model):
    model["mlp"].bias = nn.Parameter(torch.ones(3))


def tie(model):
    model["norm"].bias = model["norm"].weight


def remove(model):
    model["mlp"].bias = None


def add(model):
    model["mlp"].register_buffer("more", torch.ones(1))


def add_last(model):
    model["more"] = nn.LayerNorm(2)


def remove_last(model):
    model["norm"].bias = None


def make_fleeting(model):
    model.register_buffer("table", model.table, persistent=False)


def cast(model):
    model["mlp"].bias.data = model["mlp"].bias.data.to(fp16)


def make_parameter(model):
    del model.table
    model.table = nn.Parameter(torch.ones(2))


CHANGES = [
    (freeze, ["mlp.bias: requires_grad"]),
    (reshape, ["mlp.bias: shape should be (2,), found (3,)"]),
    (tie, ["norm.weight: names", "norm.bias: names"]),
    (remove, ["mlp.bias: presence should be a tensor, found absent"]),
    (add, ["mlp.more: presence should be absent, found a tensor"]),
    (add_last, [f"more.{name}: presence should be absent" for name in ("weight", "bias")]),
    (remove_last, ["norm.bias: presence should be a tensor, found absent"]),
    (make_fleeting, ["table: kind"]),
    (cast, ["mlp.bias: dtype should be float32, found float16"]),
    (make_parameter, ["table: kind", "table: requires_grad"]),
]


@pytest.mark.parametrize(("change", "mismatches"), CHANGES)
@pytest.mark.parametrize("is_from_json", [False, True])
def test_a_stale_plan_is_refused_with_each_mismatch_and_changes_nothing(
    change, mismatches, is_from_json, state_of
):
    model = make()
    plan = cast_plan(model, bf16)
    change(model)
    before = state_of(model)

    with pytest.raises(StalePlanError) as caught:
        apply(CastPlan.from_json(plan.to_json()) if is_from_json else plan, model)

    assert all(mismatch in str(caught.value) for mismatch in mismatches)
    assert f"{len(mismatches)} differences" in str(caught.value)
    assert state_of(model).differences(before) == []


def test_all_mismatches_are_listed_at_once():
    model = make()
    plan = cast_plan(model, bf16)
    for change in (freeze, add, make_fleeting):
        change(model)

    with pytest.raises(StalePlanError) as caught:
        apply(plan)
    head, *lines = str(caught.value).splitlines()
    assert "3 differences over 5 entries" in head
    assert [line.split(":")[0].strip() for line in lines[:-1]] == ["table", "mlp.bias", "mlp.more"]


def test_a_tie_that_is_gone_is_stale():
    model = make()
    tie(model)
    plan = cast_plan(model, bf16)
    model["norm"].bias = nn.Parameter(torch.ones(2))

    with pytest.raises(StalePlanError, match="names"):
        apply(plan)


def test_a_pin_that_now_shares_its_storage_with_a_cast_tensor_is_stale(state_of):
    model = make()
    plan = cast_plan(model, bf16, keep_fp32="norm")
    model["norm"].bias.data = model["mlp"].bias.data
    before = state_of(model)

    with pytest.raises(StalePlanError, match="storage should be its own"):
        apply(plan)
    assert state_of(model).differences(before) == []


def test_a_model_of_other_names_is_stale():
    with pytest.raises(StalePlanError):
        apply(cast_plan(make(), bf16), nn.Linear(2, 2))


def test_values_are_no_part_of_a_plan(scramble):
    model = make()
    plan = cast_plan(model, bf16)
    scramble(model)

    apply(plan)

    assert model["mlp"].weight.dtype == bf16


def tied(order):
    model, weight = nn.Module(), nn.Parameter(torch.ones(2))
    for name in order:
        setattr(model, name, weight)
    return model


def test_a_plan_casts_a_tie_that_was_registered_in_another_order():
    plan, model = cast_plan(tied("ab"), bf16), tied("ba")

    apply(plan, model)

    assert model.a is model.b
    assert model.a.dtype == bf16
    assert audit(model, plan) == ()


def test_a_tie_in_another_order_has_its_checksum(scramble):
    model = tied("ab")
    report = apply(cast_plan(model, bf16), checksum=True)
    twin = tied("ba").to(bf16)

    assert audit(twin, report, bits=True) == ()
    scramble(twin)
    assert audit(twin, report, bits=True) != ()


def test_a_cast_that_torch_does_not_know_is_refused_before_anything_changes(state_of):
    model = make()
    four_bits = torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    model.four_bits = nn.Parameter(four_bits, requires_grad=False)
    text = cast_plan(model, bf16).to_json()
    text = text.replace('"to_dtype": "float4_e2m1fn_x2"', '"to_dtype": "bfloat16"')
    before = state_of(model)

    with pytest.raises(ConfigError, match="four_bits: skip float4_e2m1fn_x2 to bfloat16"):
        apply(CastPlan.from_json(text), model)

    assert state_of(model).differences(before) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"to_dtype": "bfloat16", "action": "cast"', '"to_dtype": "bfloat16", "action": "skip"'),
        ('"to_dtype": "bfloat16", "action": "cast"', '"to_dtype": "float64", "action": "cast"'),
        ('"from_dtype": "float32", "to_dtype": "bf', '"from_dtype": "int32", "to_dtype": "bf'),
    ],
    ids=["skipped_but_changed", "to_float64", "from_int32"],
)
def test_a_plan_edited_into_no_cast_is_refused(old, new):
    text = cast_plan(nn.Linear(2, 2), bf16).to_json()
    assert old in text

    with pytest.raises(ConfigError, match=r"weight: .* is no cast"):
        CastPlan.from_json(text.replace(old, new))


def test_a_plan_that_says_two_things_of_a_tensor_is_refused_and_nothing_changed():
    model = nn.Linear(2, 2)
    plan = cast_plan(model, bf16)
    twice = attrs.evolve(plan.entries[0], to_dtype=fp16)

    with pytest.raises((StalePlanError, ConfigError), match="weight"):
        apply(attrs.evolve(plan, entries=(*plan.entries, twice)))

    assert model.weight.dtype == torch.float32


def test_a_second_entry_does_not_cast_a_pin():
    model = nn.Linear(2, 2)
    data = json.loads(cast_plan(model, bf16, keep_fp32="weight").to_json())
    data["entries"].append(data["entries"][0] | {"action": "cast", "to_dtype": "bfloat16"})

    with pytest.raises((StalePlanError, ConfigError), match="weight"):
        apply(CastPlan.from_json(json.dumps(data)), model)

    assert model.weight.dtype == torch.float32
