from __future__ import annotations

import pytest
import torch
from torch import nn

from automodel_fn import ConfigError, bf16, cast_plan, fp32


def pinned(plan):
    return {name for entry in plan.entries for name in entry.names if entry.action == "keep"}


def stack():
    layers = [nn.ModuleDict({"mlp": nn.Linear(2, 2), "norm": nn.LayerNorm(2)}) for _ in range(3)]
    return nn.ModuleDict({"layers": nn.ModuleList(layers), "head": nn.Linear(2, 2, bias=False)})


PATTERNS = [
    ("head.weight", {"head.weight"}),
    ("layers.1.norm", {"layers.1.norm.weight", "layers.1.norm.bias"}),
    ("layers.*.norm.weight", {f"layers.{i}.norm.weight" for i in range(3)}),
    (
        "*.weight",
        {"head.weight"} | {f"layers.{i}.{m}.weight" for i in range(3) for m in ("mlp", "norm")},
    ),
    ("layers.[01].norm.bias", {"layers.0.norm.bias", "layers.1.norm.bias"}),
    ("layers.?.mlp.bias", {f"layers.{i}.mlp.bias" for i in range(3)}),
    (
        r"re:layers\.[02]\.norm",
        {f"layers.{i}.norm.{t}" for i in (0, 2) for t in ("weight", "bias")},
    ),
    (("head", "layers.2.mlp.bias"), {"head.weight", "layers.2.mlp.bias"}),
    (["head", "head.weight"], {"head.weight"}),
    ((), set()),
]


@pytest.mark.parametrize(("patterns", "names"), PATTERNS)
def test_keep_fp32_pins_what_its_patterns_name(patterns, names):
    plan = cast_plan(stack(), bf16, keep_fp32=patterns)

    assert pinned(plan) == names
    assert all(entry.to_dtype == fp32 for entry in plan.entries if entry.action == "keep")


@pytest.mark.parametrize(("patterns", "names"), PATTERNS)
def test_skip_leaves_what_its_patterns_name(patterns, names):
    plan = cast_plan(stack(), bf16, skip=patterns)

    assert {entry.name for entry in plan.entries if entry.action == "skip"} == names
    assert not any(entry.changes for entry in plan.entries if entry.action == "skip")


@pytest.mark.parametrize("argument", ["keep_fp32", "skip"])
def test_the_reason_names_argument_and_pattern(argument, entry_of):
    plan = cast_plan(stack(), bf16, **{argument: "layers.*.norm"})

    assert f"{argument}='layers.*.norm'" in entry_of(plan, "layers.1.norm.bias").reason


@pytest.mark.parametrize("argument", ["keep_fp32", "skip"])
@pytest.mark.parametrize("pattern", ["haed", "*.gate", "re:layer", "layers.0.nor", "mlp"])
def test_a_pattern_that_matches_nothing_is_an_error(argument, pattern):
    with pytest.raises(ConfigError, match=f"{argument}={pattern!r} matches".replace("*", r"\*")):
        cast_plan(stack(), bf16, **{argument: pattern})


def test_an_unmatched_pattern_is_told_the_near_names():
    with pytest.raises(ConfigError, match=r"near: .*layers\.0\.norm\.weight"):
        cast_plan(stack(), bf16, keep_fp32="layers.0.nrom.weight")


def test_all_unmatched_patterns_are_listed_at_once():
    with pytest.raises(ConfigError, match=r"'gate'[\s\S]*'router'"):
        cast_plan(stack(), bf16, keep_fp32=["gate", "head", "router"])


@pytest.mark.parametrize("pattern", ["", "re:(", 3, None])
def test_what_is_no_pattern_is_an_error(pattern):
    with pytest.raises(ConfigError):
        cast_plan(stack(), bf16, skip=[pattern])


def test_a_module_without_tensors_may_be_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU())

    assert pinned(cast_plan(model, bf16, keep_fp32="1")) == set()


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_a_tied_tensor_is_named_by_each_of_its_names(zoo, name):
    assert pinned(cast_plan(zoo, bf16, keep_fp32=name)) >= {"embed.weight", "head.weight"}


@pytest.mark.parametrize("name", ["layers.0.mlp.weight", "layers.0._orig_mod.mlp.weight"])
@pytest.mark.usefixtures("_dynamo")
def test_a_wrapped_tensor_is_named_with_and_without_its_wrapper(name):
    model = stack()
    model["layers"][0] = torch.compile(model["layers"][0])

    assert pinned(cast_plan(model, bf16, keep_fp32=name)) == {"layers.0.mlp.weight"}


def test_skip_is_stronger_than_a_pin(entry_of):
    model = stack().to(bf16)

    plan = cast_plan(model, bf16, skip="layers.0", keep_fp32="layers.0.norm")

    entry = entry_of(plan, "layers.0.norm.weight")
    assert (entry.action, entry.to_dtype) == ("skip", bf16)


def test_a_pattern_that_only_names_what_another_one_names_as_well_matches(actions_of):
    model = nn.Sequential(nn.Linear(2, 2))

    plan = cast_plan(model, bf16, keep_fp32=["*", "0.weight"])

    assert actions_of(plan) == {"0.weight": "keep", "0.bias": "keep"}


def test_a_module_without_tensors_is_named_with_its_wrappers_too():
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"_orig_mod": nn.ReLU()}))

    assert cast_plan(model, bf16, keep_fp32=["1._orig_mod", "1"]) == cast_plan(model, bf16)
