from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from automodel_fn import apply, bf16, cast_plan, fp32, frozen_cast_plan

OPTIMIZERS = {
    "adamw": lambda parameters: AdamW(parameters, lr=0.1),
    "adamw foreach": lambda parameters: AdamW(parameters, lr=0.1, foreach=True),
    "adamw fused": lambda parameters: AdamW(parameters, lr=0.1, fused=True),
    "amsgrad": lambda parameters: Adam(parameters, lr=0.1, amsgrad=True),
    "sgd momentum": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
}


def make():
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1))


def train(model, optimizer):
    model(torch.randn(3, 4).to(model[0].weight.dtype)).float().square().mean().backward()
    optimizer.step()


@pytest.fixture(params=OPTIMIZERS)
def trained(request):
    model = make()
    optimizer = OPTIMIZERS[request.param](model.parameters())
    train(model, optimizer)
    return model, optimizer


def moments(optimizer):
    return {
        (index, key): value
        for index, state in enumerate(optimizer.state.values())
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key != "step"
    }


def test_gradients_are_cast_with_their_tensors(trained, same_bits):
    model, _ = trained
    expected = [p.grad.to(bf16) for p in model.parameters()]

    apply(cast_plan(model, bf16))

    pairs = zip(model.parameters(), expected, strict=True)
    assert all(same_bits(p.grad, grad) for p, grad in pairs)


def test_gradients_of_pins_are_not_touched(trained):
    model, _ = trained
    grad = model[1].weight.grad
    pointer = grad.data_ptr()

    apply(cast_plan(model, bf16, keep_fp32="1"))

    assert model[1].weight.grad is grad
    assert (grad.dtype, grad.data_ptr()) == (fp32, pointer)


@pytest.mark.parametrize("keep_originals", [False, True])
def test_optimizer_state_is_cast_along_to_the_bit(trained, same_bits, keep_originals):
    model, optimizer = trained
    expected = {key: value.to(bf16) for key, value in moments(optimizer).items()}

    apply(cast_plan(model, bf16, optimizers=[optimizer]), keep_originals=keep_originals)

    assert expected
    assert all(same_bits(value, expected[key]) for key, value in moments(optimizer).items())


def test_step_counters_stay(trained):
    model, optimizer = trained
    model.scalar = nn.Parameter(torch.tensor(1.0))
    optimizer.add_param_group({"params": [model.scalar]})
    model.scalar.grad = torch.tensor(1.0)
    optimizer.step()
    before = [copy.deepcopy(state.get("step")) for state in optimizer.state.values()]

    apply(cast_plan(model, bf16, optimizers=[optimizer]))

    assert [state.get("step") for state in optimizer.state.values()] == before
    steps = [state["step"] for state in optimizer.state.values() if "step" in state]
    assert all(getattr(step, "dtype", fp32) == fp32 for step in steps)


def test_training_goes_on(trained):
    model, optimizer = trained
    apply(cast_plan(model, bf16, optimizers=[optimizer]))
    before = [p.detach().clone() for p in model.parameters()]

    for _ in range(2):
        train(model, optimizer)
        optimizer.zero_grad()

    assert {p.dtype for p in model.parameters()} == {bf16}
    pairs = zip(before, model.parameters(), strict=True)
    assert not any(torch.equal(old, new) for old, new in pairs)
    assert {value.dtype for value in moments(optimizer).values()} == {bf16}


def test_training_goes_on_with_the_gradients_that_were_there(trained):
    model, optimizer = trained
    apply(cast_plan(model, bf16, optimizers=[optimizer]))

    before = model[0].weight.detach().clone()
    optimizer.step()

    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_made_before_the_cast_moves_the_cast_weights(name):
    model = make()
    optimizer = OPTIMIZERS[name](model.parameters())
    apply(cast_plan(model, bf16))

    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer)

    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_state_of_pins_and_of_skipped_tensors_stays(trained):
    model, optimizer = trained
    others = [p for p in model.parameters() if p is not model[0].weight]

    plan = cast_plan(model, bf16, keep_fp32="1", skip=["2", "0.bias"], optimizers=[optimizer])
    apply(plan)

    for p in others:
        assert all(v.dtype == fp32 for v in optimizer.state[p].values() if torch.is_tensor(v))


def test_an_optimizer_that_was_not_given_is_not_touched(trained):
    model, optimizer = trained

    apply(cast_plan(model, bf16))

    assert {value.dtype for value in moments(optimizer).values()} == {fp32}


def test_planning_makes_no_optimizer_state():
    model = make()
    optimizer = AdamW(model.parameters())

    apply(cast_plan(model, bf16, optimizers=[optimizer]))

    assert len(optimizer.state) == 0


def test_undo_brings_gradients_and_state_back(trained, state_of, same_bits):
    model, optimizer = trained
    before, saved = state_of(model), {k: v.clone() for k, v in moments(optimizer).items()}

    apply(cast_plan(model, bf16, optimizers=[optimizer]), keep_originals=True).undo()

    assert state_of(model).differences(before) == []
    assert all(same_bits(value, saved[key]) for key, value in moments(optimizer).items())


def test_training_goes_on_after_an_inverse(trained):
    model, optimizer = trained
    plan = cast_plan(model, bf16, optimizers=[optimizer])
    apply(plan)

    apply(plan.inverse())
    train(model, optimizer)

    assert {value.dtype for value in moments(optimizer).values()} == {fp32}


def test_adapters_train_on_a_cast_frozen_model():
    model = make()
    model[0].requires_grad_(False)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)

    apply(frozen_cast_plan(model, bf16))
    before = model[2].weight.detach().clone()
    model[2](model[1](model[0](torch.randn(3, 4, dtype=bf16)).float())).sum().backward()
    optimizer.step()

    assert model[0].weight.dtype == bf16
    assert model[2].weight.dtype == fp32
    assert not torch.equal(model[2].weight, before)


@pytest.mark.parametrize(
    ("make", "counters"),
    [(torch.optim.NAdam, {"step", "mu_product"}), (torch.optim.ASGD, {"step", "eta", "mu"})],
)
def test_counters_of_a_scalar_parameter_stay(make, counters):
    model = nn.ParameterList([nn.Parameter(torch.tensor(1.5))])
    optimizer = make(model.parameters())
    model[0].square().backward()
    optimizer.step()

    apply(cast_plan(model, bf16, optimizers=[optimizer]))

    assert {optimizer.state[model[0]][key].dtype for key in counters} == {fp32}
