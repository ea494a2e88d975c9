from __future__ import annotations

import pytest
import torch
from torch import nn

from automodel_fn import CastPlan, ConfigError, bf16, cast_plan, fp32


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.sinks = nn.Parameter(torch.zeros(4))
        self.register_buffer("mask", torch.zeros(4))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention, self.router = nn.LayerNorm(4), Attention(), Router()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(4, 5, bias=False)


def units(model, keep_fp32=(), **arguments):
    return cast_plan(model, bf16, keep_fp32=keep_fp32, **arguments).fsdp_units()


def outline(found):
    return [(unit.names, unit.kind) for unit in found]


def test_a_pinned_module_is_a_unit_that_computes_in_float32_and_returns_the_plans_dtype():
    (unit,) = units(Model(), "layers.1.norm")
    assert unit.names == ("layers.1.norm",)
    assert unit.kind == "whole"
    assert unit.pins == ("layers.1.norm.weight", "layers.1.norm.bias")
    policy = unit.policy()
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (fp32, fp32, bf16)
    assert policy.cast_forward_inputs


def test_the_largest_wholly_pinned_module_is_one_unit():
    assert outline(units(Model(), "*.router")) == [
        (("layers.0.router",), "whole"),
        (("layers.1.router",), "whole"),
    ]


def test_a_list_of_pinned_modules_is_no_unit_since_it_has_no_forward():
    assert outline(units(Model(), "layers")) == [
        (("layers.0",), "whole"),
        (("layers.1",), "whole"),
    ]


def test_a_model_that_is_pinned_as_a_whole_is_one_unit():
    assert outline(units(Model(), "*")) == [(("",), "whole")]


def test_a_pin_beside_other_parameters_is_said_to_be_mixed_and_no_dtype_is_forced():
    (unit,) = units(Model(), "layers.0.attention.sinks")
    assert outline([unit]) == [(("layers.0.attention",), "mixed")]
    policy = unit.policy()
    assert (policy.param_dtype, policy.output_dtype) == (None, None)
    assert not policy.cast_forward_inputs


def test_modules_that_share_a_pin_are_one_unit():
    model = Model()
    model.head.weight = model.embed.weight
    (unit,) = units(model, "embed.weight")
    assert outline([unit]) == [(("embed", "head"), "whole")]
    assert unit.pins == ("embed.weight",)


def test_a_pin_that_is_shared_with_a_mixed_module_makes_both_mixed():
    model = Model()
    model.layers[0].norm.bias = model.layers[1].router.last.weight
    (unit,) = units(model, "layers.0.norm.bias")
    assert set(unit.names) == {"layers.0.norm", "layers.1.router.last"}
    assert unit.kind == "mixed"


def test_what_is_skipped_in_another_dtype_and_trained_is_a_unit_too():
    model = Model()
    assert outline(units(model, skip="layers.0.norm")) == [(("layers.0.norm",), "whole")]
    model.requires_grad_(False)
    assert units(model, skip="layers.0.norm") == ()
    assert outline(units(model, "layers.0.norm")) == [(("layers.0.norm",), "whole")]


def test_buffers_need_no_unit():
    assert units(Model(), "*.mask") == ()


def test_a_model_without_pins_or_in_float32_needs_no_units():
    assert units(Model()) == ()
    assert cast_plan(Model(), fp32, keep_fp32="*.norm").fsdp_units() == ()


def test_a_plan_that_went_through_json_has_the_same_units():
    plan = cast_plan(Model(), bf16, keep_fp32=["*.norm", "*.sinks"])
    assert CastPlan.from_json(plan.to_json()).fsdp_units() == plan.fsdp_units()
    assert len(plan.fsdp_units()) == 4


def test_the_units_of_a_model_that_is_cast_already_are_the_same():
    model = Model()
    keep = ["*.norm", "*.sinks"]
    before = outline(units(model, keep))
    for name, parameter in model.named_parameters():
        if "norm" not in name and "sinks" not in name:
            parameter.data = parameter.data.bfloat16()
    assert outline(units(model, keep)) == before


def test_an_inverse_has_no_units():
    with pytest.raises(ConfigError, match="no single dtype"):
        cast_plan(Model(), bf16).inverse().fsdp_units()
