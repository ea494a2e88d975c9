from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from automodel_fn import ConfigError, bf16, cast_plan, fp16

pytestmark = pytest.mark.usefixtures("_dynamo")

PLAIN, STRICT = "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"


def declaring(keywords, attribute=PLAIN, **children):
    model = nn.ModuleDict(children or {"mlp": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    setattr(model, attribute, keywords)
    return model


def pinned(model, dtype=bf16, **arguments):
    entries = cast_plan(model, dtype, **arguments).entries
    return {name for entry in entries for name in entry.names if entry.action == "keep"}


NORM = {"norm.weight", "norm.bias"}


@pytest.mark.parametrize("attribute", [PLAIN, STRICT])
@pytest.mark.parametrize("keywords", [["norm"], ("norm",), {"norm"}, frozenset({"norm"})])
def test_keywords_pin_what_they_match(attribute, keywords):
    assert pinned(declaring(keywords, attribute)) == NORM


@pytest.mark.parametrize("keywords", [None, [], (), set()])
def test_no_keywords_pin_nothing_and_are_no_note(keywords):
    plan = cast_plan(declaring(keywords), bf16)

    assert {entry.action for entry in plan.entries} == {"cast"}
    assert plan.notes == ()


def test_plain_and_strict_keywords_add_up():
    model = declaring(["mlp.weight"], PLAIN)
    setattr(model, STRICT, ["norm"])

    assert pinned(model) == {"mlp.weight", *NORM}


def test_a_keyword_on_the_class_counts_as_one_on_the_object():
    class Declaring(nn.Sequential):
        _keep_in_fp32_modules = ("1",)

    assert pinned(Declaring(nn.Linear(2, 2), nn.LayerNorm(2))) == {"1.weight", "1.bias"}


@pytest.mark.parametrize("wrong", ["norm", 3, {"norm": 1}, [""], [None], ["norm", 5]])
def test_a_declaration_that_is_no_list_of_keywords_is_refused(wrong):
    with pytest.raises(ConfigError, match=f"ModuleDict.{PLAIN}"):
        cast_plan(declaring(wrong), bf16)


def test_a_child_s_declaration_acts_beneath_it_only():
    child = declaring(["norm"])

    assert pinned(nn.ModuleDict({"tower": child, "norm": nn.LayerNorm(2)})) == {
        f"tower.{name}" for name in NORM
    }


def test_a_child_s_keyword_does_not_match_the_name_of_the_child_itself():
    child = declaring(["tower"], tower_inside=nn.Linear(2, 2, bias=False), rest=nn.Linear(2, 2))

    assert pinned(nn.ModuleDict({"tower": child})) == {"tower.tower_inside.weight"}


def test_a_declaration_counts_at_any_depth():
    model = nn.Sequential(nn.Sequential(nn.Sequential(declaring(["norm"]))))

    assert pinned(model) == {f"0.0.0.{name}" for name in NORM}


def names_to_match():
    return declaring(
        ["wo", "mlp.gate"],
        word_embeddings=nn.Embedding(2, 2),
        wo=nn.Linear(2, 2, bias=False),
        mlp=nn.ModuleDict({"gate": nn.Linear(2, 2, bias=False), "gate_up": nn.Linear(2, 2)}),
    )


@pytest.mark.parametrize(
    ("match", "names"),
    [
        (
            "substring",
            {
                "word_embeddings.weight",
                "wo.weight",
                "mlp.gate.weight",
                "mlp.gate_up.weight",
                "mlp.gate_up.bias",
            },
        ),
        ("segment", {"wo.weight", "mlp.gate.weight"}),
    ],
)
def test_match_says_what_counts_as_a_hit(match, names):
    assert pinned(names_to_match(), match=match) == names


def test_an_unknown_match_is_refused():
    with pytest.raises(ConfigError, match="match='regex'"):
        cast_plan(nn.Linear(2, 2), bf16, match="regex")


def parametrized():
    return nn.ModuleDict({"norm": weight_norm(nn.Linear(2, 2)), "mlp": nn.Linear(2, 2)})


def test_a_parametrized_tensor_is_matched_by_its_own_name():
    model = parametrized()
    model._keep_in_fp32_modules = ["norm.weight"]

    assert pinned(model) == {
        "norm.parametrizations.weight.original0",
        "norm.parametrizations.weight.original1",
    }


def test_wrapped_modules_are_matched_without_their_wrappers():
    model = nn.ModuleDict({"mlp": torch.compile(nn.ModuleDict({"gate": nn.Linear(2, 2)}))})
    model._keep_in_fp32_modules = ["mlp.gate.weight"]

    assert pinned(model) == {"mlp.gate.weight"}


def test_a_declaration_that_a_wrapper_passes_through_counts_once():
    inner = declaring(["norm", "absent"])

    plan = cast_plan(torch.compile(inner), bf16)

    assert plan == cast_plan(inner, bf16)
    assert len(plan.notes) == len(set(plan.notes))


@pytest.mark.parametrize("keyword", ["embed", "head"])
def test_a_pin_on_any_name_of_a_tied_tensor_pins_it(zoo, keyword, entry_of):
    zoo._keep_in_fp32_modules_strict = [keyword]

    entry = entry_of(cast_plan(zoo, bf16), "embed.weight")

    assert (entry.action, entry.to_dtype) == ("keep", torch.float32)
    assert repr(keyword) in entry.reason


def test_the_reason_names_keyword_source_and_alias(zoo, entry_of):
    zoo._keep_in_fp32_modules_strict = ["head"]

    reason = entry_of(cast_plan(zoo, bf16), "head.weight").reason

    assert f"keyword 'head' of _Zoo.{STRICT}" in reason
    assert "'head.weight'" in reason


def test_a_keyword_that_matches_nothing_is_a_note():
    (note,) = cast_plan(declaring(["absent"]), bf16).notes

    assert "'absent'" in note
    assert "matched nothing" in note


def test_a_match_inside_a_segment_is_a_note_that_names_it():
    notes = cast_plan(declaring(["wo"], two_way=nn.Linear(2, 2)), bf16).notes

    assert any("inside a name segment" in note and "two_way.weight" in note for note in notes)
    assert not any(
        "inside" in n for n in cast_plan(declaring(["wo"], wo=nn.Linear(2, 2)), bf16).notes
    )


@pytest.mark.parametrize("stored", [bf16, fp16])
def test_a_narrow_pin_is_cast_up_and_its_lost_bits_are_named(stored):
    model = declaring(["norm"]).to(stored)

    plan = cast_plan(model, bf16)
    entry = next(e for e in plan.entries if e.name == "norm.weight")

    assert (entry.action, entry.from_dtype, entry.to_dtype) == ("keep", stored, torch.float32)
    assert "low bits were already gone" in entry.reason
    assert any("norm.weight" in note and "low bits" in note for note in plan.notes)


@pytest.mark.parametrize("stored", [torch.float64, torch.int32, torch.complex64])
def test_a_pin_that_has_no_float32_to_keep_is_left(make_holder, stored):
    model = make_holder(norm=torch.ones(2, dtype=stored))
    model._keep_in_fp32_modules = ["norm"]

    (entry,) = cast_plan(model, bf16).entries

    assert (entry.action, entry.to_dtype) == ("skip", stored)
    assert "'norm'" in entry.reason
