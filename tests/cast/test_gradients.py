from __future__ import annotations

import pytest
import torch
from torch import nn

from automodel_fn import apply, bf16, cast_plan, fp32, temporary_cast

MODES = pytest.mark.parametrize("keep_originals", [False, True])


@pytest.fixture
def with_registered_gradient(make_holder):
    def make():
        model = make_holder(weight=nn.Parameter(torch.ones(3)), table=torch.full((3,), 1.001))
        model.weight.grad = model.table
        return model

    return make


@MODES
@pytest.mark.parametrize("rule", [{"keep_fp32": "table"}, {"skip": "table"}, {"buffers": "none"}])
def test_a_gradient_that_is_a_tensor_of_the_model_is_cast_by_the_rule_of_that_tensor(
    with_registered_gradient, rule, keep_originals
):
    model = with_registered_gradient()

    apply(cast_plan(model, bf16, **rule), keep_originals=keep_originals)

    assert (model.weight.dtype, model.table.dtype) == (bf16, fp32)
    assert model.weight.grad is model.table
    assert torch.equal(model.table, torch.full((3,), 1.001))


def test_undo_brings_a_gradient_that_is_a_tensor_of_the_model_back(
    with_registered_gradient, state_of
):
    model = with_registered_gradient()
    before = state_of(model)

    apply(cast_plan(model, bf16), keep_originals=True).undo()

    assert state_of(model).differences(before) == []


def test_a_temporary_cast_brings_a_gradient_that_is_a_tensor_of_the_model_back(
    with_registered_gradient, state_of
):
    model = with_registered_gradient()
    before = state_of(model)

    with temporary_cast(model, bf16):
        assert model.weight.grad is model.table

    assert state_of(model).differences(before) == []


@MODES
def test_a_gradient_of_two_parameters_is_cast_once(make_holder, same_bits, keep_originals):
    grad = torch.full((3,), 1.001)
    model = make_holder(a=nn.Parameter(torch.ones(3)), b=nn.Parameter(torch.ones(3)))
    model.a.grad = model.b.grad = grad

    report = apply(cast_plan(model, bf16), keep_originals=keep_originals)

    assert model.a.grad is model.b.grad is grad
    assert same_bits(grad, torch.full((3,), 1.001).to(bf16))
    if keep_originals:
        report.undo()
        assert same_bits(grad, torch.full((3,), 1.001))


@MODES
def test_a_buffer_that_an_operation_made_is_cast_without_a_warning(make_holder, keep_originals):
    weight = nn.Parameter(torch.full((3,), 1.001))
    model = make_holder(weight=weight, doubled=weight * 2)

    report = apply(cast_plan(model, bf16), keep_originals=keep_originals)
    assert model.doubled.dtype == bf16
    if keep_originals:
        report.undo()
    with temporary_cast(model, bf16):
        pass

    assert model.doubled.grad_fn is not None


def test_a_gradient_that_was_retained_by_what_an_operation_made_is_cast_with_it(make_holder):
    weight = nn.Parameter(torch.ones(3))
    doubled = weight * 2
    doubled.retain_grad()
    doubled.sum().backward()
    model = make_holder(weight=weight, doubled=doubled)

    apply(cast_plan(model, bf16))

    assert model.doubled.grad.dtype == bf16


def test_undo_leaves_a_tensor_of_the_model_that_became_a_gradient(make_holder):
    model = make_holder(weight=nn.Parameter(torch.ones(3)), table=torch.ones(3, dtype=bf16))
    report = apply(cast_plan(model, bf16), keep_originals=True)
    model.weight.grad = model.table

    report.undo()

    assert (model.weight.dtype, model.table.dtype) == (fp32, bf16)


def test_a_temporary_cast_leaves_a_tensor_of_the_model_that_became_a_gradient(make_holder):
    model = make_holder(weight=nn.Parameter(torch.ones(3, dtype=bf16)), table=torch.ones(3))

    with temporary_cast(model, fp32):
        model.weight.grad = model.table

    assert (model.weight.dtype, model.table.dtype) == (bf16, fp32)
