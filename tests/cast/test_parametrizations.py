from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from automodel_fn import apply, audit, bf16, cast_plan, fp16, fp32, temporary_cast


class Doubled(nn.Module):
    def forward(self, original):
        return original * 2

    def right_inverse(self, value):
        return value / 2


def custom(layer):
    return parametrize.register_parametrization(layer, "weight", Doubled())


KINDS = pytest.mark.parametrize("kind", [weight_norm, orthogonal, spectral_norm, custom])


@KINDS
@pytest.mark.parametrize("dtype", [bf16, fp16])
def test_the_originals_of_a_parametrization_are_cast_to_the_bit(kind, dtype, same_bits):
    model = nn.Sequential(kind(nn.Linear(4, 4)))
    expected = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    plan = cast_plan(model, dtype)

    apply(plan)

    assert any("original" in name for name in expected)
    assert all(same_bits(p, expected[name]) for name, p in model.named_parameters())
    assert audit(model, plan) == ()


@KINDS
def test_a_pin_on_what_a_parametrization_stands_for_pins_its_originals(kind, state_of):
    model = nn.ModuleDict({"gate": kind(nn.Linear(4, 4)), "wo": nn.Linear(4, 4)})
    model._keep_in_fp32_modules = ["gate.weight"]
    before = {name: p.detach().clone() for name, p in model["gate"].named_parameters()}

    apply(cast_plan(model, bf16))

    now = dict(model["gate"].named_parameters())
    pinned = [name for name in now if "original" in name]
    assert pinned
    assert all(torch.equal(now[name], before[name]) for name in pinned)
    assert {now[name].dtype for name in pinned} == {fp32}
    assert now["bias"].dtype == model["wo"].weight.dtype == bf16


@pytest.mark.parametrize("kind", [weight_norm, custom])
def test_a_parametrized_layer_runs_after_its_cast(kind):
    model = kind(nn.Linear(4, 4))

    apply(cast_plan(model, bf16))

    assert model(torch.ones(2, 4, dtype=bf16)).dtype == bf16


@KINDS
def test_a_temporary_cast_and_an_undo_bring_a_parametrized_layer_back(kind, state_of):
    model = kind(nn.Linear(4, 4))
    before = state_of(model)

    with temporary_cast(model, bf16):
        assert {p.dtype for p in model.parameters()} == {bf16}
    apply(cast_plan(model, bf16), keep_originals=True).undo()

    assert state_of(model).differences(before) == []


def test_a_parametrization_that_is_removed_after_the_cast_leaves_the_cast_weight():
    model = custom(nn.Linear(4, 4))
    expected = (model.parametrizations.weight.original.detach().to(bf16)) * 2
    apply(cast_plan(model, bf16))

    parametrize.remove_parametrizations(model, "weight")

    assert torch.equal(model.weight, expected)
