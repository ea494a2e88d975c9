from __future__ import annotations

import json

import pytest
from torch import nn

from automodel_fn import CastPlan, ConfigError, apply, bf16, cast_plan, fp16


def make():
    return nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))


def planned():
    return cast_plan(make(), bf16)


def test_json_round_trips(zoo):
    plan = cast_plan(zoo, bf16, keep_fp32="head", skip="special")

    assert CastPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    "plan",
    [
        CastPlan(()),
        planned().inverse(),
        planned().inverse().inverse(),
        cast_plan(make().to(bf16), bf16, keep_fp32="1").inverse(),
        cast_plan(nn.Module(), fp16),
    ],
)
def test_json_round_trips_at_the_edges(plan):
    assert CastPlan.from_json(plan.to_json()) == plan


def test_an_inverse_from_json_has_the_plan_as_its_inverse():
    plan = cast_plan(make().to(bf16), bf16, keep_fp32="1")

    assert CastPlan.from_json(plan.inverse().to_json()).inverse() == plan


def test_json_is_json_with_one_entry_a_line(zoo):
    plan = cast_plan(zoo, bf16)

    text = plan.to_json()

    assert len(json.loads(text)["entries"]) == len(plan.entries)
    assert len(text.splitlines()) == len(plan.entries) + 2


def test_a_plan_from_json_casts_the_model_that_it_is_given():
    model = make()

    apply(CastPlan.from_json(cast_plan(model, bf16).to_json()), model)

    assert {p.dtype for p in model.parameters()} == {bf16}


@pytest.mark.parametrize("text", ["", "{", "nonsense", None, 3])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(ConfigError, match="no JSON"):
        CastPlan.from_json(text)


@pytest.mark.parametrize(
    "text", ["[]", "null", "3", "{}", '{"format": "automodel_fn.cast_plan/2"}']
)
def test_json_of_something_else_is_refused(text):
    with pytest.raises(ConfigError, match="no cast plan"):
        CastPlan.from_json(text)


def changed(**fields):
    data = json.loads(planned().to_json())
    data.update(fields)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"entries": None}, "plan.entries=None"),
        ({"entries": {}}, "plan.entries={}"),
        ({"entries": ["x"]}, "entries[0]='x'"),
        ({"notes": "x"}, "plan.notes='x'"),
        ({"notes": [1]}, "plan.notes=[1]"),
        ({"dtype": "bf17"}, "dtype='bf17'"),
        ({"dtype": 16}, "dtype=16"),
        ({"inverse_of": 16}, "inverse_of=16"),
        ({"inverse_of": "bf17"}, "plan.inverse_of"),
    ],
)
def test_a_malformed_plan_is_refused_and_the_place_named(fields, place):
    with pytest.raises(ConfigError) as caught:
        CastPlan.from_json(changed(**fields))

    assert place in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("names", []), ("names", "weight"), ("names", [1]), ("kind", None), ("kind", "weights"),
        ("shape", [-1]), ("shape", [True]), ("shape", [1.5]), ("shape", "2x2"),
        ("from_dtype", "float33"), ("from_dtype", 32), ("to_dtype", "nn"), ("to_dtype", None),
        ("action", "drop"), ("action", 1), ("reason", None), ("requires_grad", 1),
        ("requires_grad", "true"), ("inverse_of", "skip"),
        ("inverse_of", 1), ("inverse_of", ["cast"]),
    ],
)  # fmt: skip
def test_a_malformed_entry_is_refused_and_the_place_named(field, value):
    data = json.loads(planned().to_json())
    data["entries"][2][field] = value

    with pytest.raises(ConfigError) as caught:
        CastPlan.from_json(json.dumps(data))

    assert "entries[2]" in str(caught.value)
    assert field in str(caught.value)


@pytest.mark.parametrize(
    "field",
    ["names", "kind", "shape", "from_dtype", "to_dtype", "action", "reason", "requires_grad"],
)
def test_a_field_that_is_missing_is_refused(field):
    data = json.loads(planned().to_json())
    del data["entries"][1][field]

    with pytest.raises(ConfigError, match=rf"entries\[1\].*{field}"):
        CastPlan.from_json(json.dumps(data))
