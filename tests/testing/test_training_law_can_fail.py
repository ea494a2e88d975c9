import attrs
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from automodel_fn import apply, bf16, cast_plan
from automodel_fn.testing import check_training_goes_on


def momentum(parameters):
    return SGD(parameters, lr=0.1, momentum=0.9)


def forgets_the_optimizers(model, dtype, optimizers=(), **options):
    return cast_plan(model, dtype, **options)


def damaging(damage):
    def apply_and_damage(plan, model, **options):
        report = apply(plan, model, **options)
        for optimizer in plan.optimizer_refs.alive():
            for state in optimizer.state.values():
                damage(state)
        return report

    return apply_and_damage


def replaces_state(state):
    state["momentum_buffer"] = state["momentum_buffer"].clone()


def drops_state(state):
    state.clear()


def rounds_state(state):
    state["momentum_buffer"].mul_(1.5)


def undone_in_part(plan, model, **options):
    report = apply(plan, model, **options)

    def undo():
        report.undo()
        for optimizer in plan.optimizer_refs.alive():
            for state in optimizer.state.values():
                state["momentum_buffer"].copy_(state["momentum_buffer"].bfloat16())

    return attrs.evolve(report, undo_cast=undo) if options else report


def test_a_plan_that_forgets_its_optimizers_is_told(model, stand_in):
    check_training_goes_on(model, bf16, AdamW)
    stand_in("optimizers", "cast_plan", forgets_the_optimizers)
    with pytest.raises(AssertionError, match="expected torch"):
        check_training_goes_on(model, bf16, AdamW)


@pytest.mark.parametrize("damage", [replaces_state, drops_state, rounds_state])
def test_damaged_state_is_told(model, stand_in, damage):
    check_training_goes_on(model, bf16, momentum)
    stand_in("optimizers", "apply", damaging(damage))
    with pytest.raises(AssertionError, match="state"):
        check_training_goes_on(model, bf16, momentum)


def test_an_undo_that_leaves_state_rounded_is_told(model, stand_in):
    stand_in("optimizers", "apply", undone_in_part)
    with pytest.raises(AssertionError, match="cast and undo: state"):
        check_training_goes_on(model, bf16, momentum)


def test_weights_that_do_not_move_are_told(model, stand_in):
    def replacing(plan, model, **options):
        report = apply(plan, model, **options)
        if plan.optimizer_refs.alive():
            model["wo"].weight = nn.Parameter(model["wo"].weight.detach().clone())
        return report

    stand_in("optimizers", "apply", replacing)
    with pytest.raises(AssertionError, match="then a step"):
        check_training_goes_on(model, bf16, momentum)


def test_a_model_without_trained_weights_has_nothing_to_go_on(model):
    check_training_goes_on(model.requires_grad_(False), torch.float16, AdamW)
