from __future__ import annotations

import pytest
import torch
from torch import nn

from automodel_fn import ConfigError, StalePlanError, apply, bf16, cast_plan, fp16, fp32


def make():
    return nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))


def kept(model, dtype=bf16, **arguments):
    return apply(cast_plan(model, dtype, **arguments), keep_originals=True)


@pytest.mark.parametrize("dtype", [bf16, fp16, fp32])
@pytest.mark.parametrize("buffers", ["all", "none"])
def test_undo_brings_every_bit_of_every_object_back(zoo, state_of, dtype, buffers):
    before = state_of(zoo)

    kept(zoo, dtype, buffers=buffers).undo()

    assert state_of(zoo).differences(before) == []


def test_undo_puts_the_originals_themselves_back(zoo, tensors_of):
    before = {name: tensor.data_ptr() for name, tensor in tensors_of(zoo).items()}

    kept(zoo).undo()

    assert {name: tensor.data_ptr() for name, tensor in tensors_of(zoo).items()} == before


def test_undo_after_a_cast_up_of_pins(state_of):
    model = make().to(bf16)
    before = state_of(model)

    kept(model, keep_fp32="1").undo()

    assert state_of(model).differences(before) == []


def test_undo_without_originals_is_an_error_that_says_what_to_do(state_of):
    model = make()
    report = apply(cast_plan(model, bf16))
    before = state_of(model)

    with pytest.raises(ConfigError, match="keep_originals=True"):
        report.undo()
    assert state_of(model).differences(before) == []


def test_undo_works_once(state_of):
    model = make()
    report = kept(model)
    report.undo()
    before = state_of(model)

    with pytest.raises(StalePlanError, match="undone already"):
        report.undo()
    assert state_of(model).differences(before) == []


def test_undo_of_nothing_is_nothing(state_of):
    model = make()
    before = state_of(model)

    kept(model, fp32).undo()

    assert state_of(model).differences(before) == []


@pytest.mark.parametrize("value", [-0.0, 3.0, float("nan")])
def test_undo_is_refused_if_a_weight_changed_since(state_of, value):
    model = make()
    model[1].bias.data.zero_()
    report = kept(model)
    with torch.no_grad():
        model[1].bias[1] = value
    before = state_of(model)

    with pytest.raises(StalePlanError, match=r"1 tensors[\s\S]*1\.bias"):
        report.undo()
    assert state_of(model).differences(before) == []


def test_a_refused_undo_works_once_the_weights_are_back(state_of):
    model = make()
    before, report = state_of(model), kept(model)
    with torch.no_grad():
        cast = model[0].bias.clone()
        model[0].bias.add_(1.0)
    with pytest.raises(StalePlanError):
        report.undo()

    with torch.no_grad():
        model[0].bias.copy_(cast)
    report.undo()

    assert state_of(model).differences(before) == []


def test_all_weights_that_changed_are_listed():
    model = make()
    report = kept(model)
    with torch.no_grad():
        model[0].weight.add_(1.0)
        model[1].weight.add_(1.0)

    with pytest.raises(StalePlanError, match=r"2 tensors[\s\S]*0\.weight[\s\S]*1\.weight"):
        report.undo()


@pytest.mark.parametrize("change", ["reshape", "cast"])
def test_undo_is_refused_if_a_weight_has_another_form(change):
    model = make()
    report = kept(model)
    data = model[0].weight.data
    model[0].weight.data = data.view(4) if change == "reshape" else data.float()

    with pytest.raises(StalePlanError, match=r"0\.weight"):
        report.undo()
    assert model[1].weight.dtype == bf16


def test_undo_is_refused_if_a_parameter_was_replaced_since(state_of):
    model = make()
    report = kept(model)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    before = state_of(model)

    with pytest.raises(StalePlanError, match=r"0\.weight"):
        report.undo()
    assert state_of(model).differences(before) == []


def test_gradients_from_before_are_brought_back_to_the_bit(special, state_of):
    model = make()
    model[0].weight.grad = special(2, 2)
    before = state_of(model)

    kept(model).undo()

    assert state_of(model).differences(before) == []


def test_gradients_that_came_since_are_cast_back_with_their_weights(same_bits):
    model = make()
    report = kept(model)
    model[0].weight.grad = torch.tensor([[1.5, -0.0], [2.0, 3.0]], dtype=bf16)
    expected = model[0].weight.grad.float()

    report.undo()

    assert same_bits(model[0].weight.grad, expected)


def test_gradients_that_were_accumulated_since_are_kept():
    model = make()
    model[0].weight.grad = torch.tensor([[1.001, 2.0], [3.0, 4.0]])
    report = kept(model)
    with torch.no_grad():
        model[0].weight.grad[1, 1] = 7.0

    report.undo()

    assert torch.equal(model[0].weight.grad, torch.tensor([[1.001, 2.0], [3.0, 7.0]]))


def test_a_gradient_that_was_dropped_since_stays_dropped():
    model = make()
    model[0].weight.grad = torch.ones(2, 2)
    report = kept(model)
    model.zero_grad()

    report.undo()

    assert model[0].weight.grad is None
    assert model[0].weight.dtype == fp32


@pytest.mark.parametrize("step", [1, 2])
def test_undo_brings_views_with_gaps_back_to_the_bit(make_holder, special, state_of, step):
    flat = special(64)
    flat.view(torch.int32)[::4] = 0x7F800123
    model = make_holder(a=nn.Parameter(flat[:40]), b=nn.Parameter(flat[20::step]))
    before = state_of(model)

    kept(model).undo()

    assert state_of(model).differences(before) == []


def test_training_after_undo_moves_the_weights():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    kept(model).undo()
    before = model[0].weight.detach().clone()

    model(torch.randn(3, 2)).square().sum().backward()
    optimizer.step()

    assert not torch.equal(model[0].weight, before)
