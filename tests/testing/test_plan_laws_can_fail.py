import contextlib
import itertools

import attrs
import pytest
import torch
from torch import nn

from automodel_fn import StalePlanError, apply, bf16, cast_plan, frozen_cast_plan
from automodel_fn.testing import check_frozen_plan, check_inverse, check_plan_is_pure, check_undo


def looks_at_data(model, dtype):
    weight = model["wo"].weight
    skip = "norm" if not weight.is_meta and bool((weight > 0).all()) else ()
    return cast_plan(model, dtype, skip=skip)


def looks_at_the_device(model, dtype):
    return cast_plan(model, dtype, skip="norm" if model["wo"].weight.is_meta else ())


def writes(model, dtype):
    with torch.no_grad():
        if not model["wo"].weight.is_meta:
            model["wo"].weight.add_(0)
    return cast_plan(model, dtype)


def leaves_an_attribute(model, dtype):
    model["wo"].seen = True
    return cast_plan(model, dtype)


def casts_at_once(model, dtype):
    plan = cast_plan(model, dtype)
    model["norm"].weight.data = model["norm"].weight.data.to(dtype)
    return plan


def keeps_the_order(model, dtype):
    notes = tuple(vars(model).get("_keep_in_fp32_modules", ()))
    return attrs.evolve(cast_plan(model, dtype), notes=notes)


def knows_lists_only(model, dtype):
    skip = () if isinstance(vars(model).get("_keep_in_fp32_modules"), list) else "norm"
    return cast_plan(model, dtype, skip=skip)


def looks_at_identities(model, dtype):
    return attrs.evolve(cast_plan(model, dtype), notes=(str(id(model)),))


numbers = itertools.count()


def differs_each_time(model, dtype):
    return attrs.evolve(cast_plan(model, dtype), notes=(str(next(numbers)),))


@pytest.mark.parametrize(
    "planner",
    [
        looks_at_data,
        looks_at_the_device,
        writes,
        leaves_an_attribute,
        casts_at_once,
        differs_each_time,
        keeps_the_order,
        knows_lists_only,
        looks_at_identities,
    ],
)
def test_a_plan_that_is_not_pure_is_told(model, stand_in, planner):
    model._keep_in_fp32_modules = ["norm", "nor"]
    check_plan_is_pure(model, bf16)
    stand_in("plan", "cast_plan", planner)
    with pytest.raises(AssertionError, match="plan"):
        check_plan_is_pure(model, bf16)


def replans(plan, model=None, **options):
    model = plan.model() if model is None else model
    return apply(cast_plan(model, bf16), model, **options)


def needs_no_model(plan, model=None):
    return None if model is None else apply(plan, model)


def casts_before_it_refuses(plan, model=None):
    if model is not None:
        apply(cast_plan(model, bf16), model)
    return apply(plan, model)


def lists_the_first_alone(plan, model=None):
    try:
        return apply(plan, model)
    except StalePlanError as error:
        raise StalePlanError("\n".join(str(error).splitlines()[:2])) from None


def applies_again(plan, model=None):
    if model is not None:
        held = dict(model.named_parameters(remove_duplicate=False))
        changed = [e for e in plan.entries if e.changes and e.name in held]
        if changed and all(held[e.name].dtype == e.to_dtype for e in changed):
            return None
    return apply(plan, model)


def ignores(field):
    def apply_anyway(plan, model=None):
        try:
            return apply(plan, model)
        except StalePlanError as error:
            if all(f": {field} " in line for line in str(error).splitlines()[1:-1]):
                return None
            raise

    return apply_anyway


@pytest.mark.parametrize(
    "wrong",
    [
        replans,
        needs_no_model,
        casts_before_it_refuses,
        lists_the_first_alone,
        applies_again,
        *map(ignores, ("dtype", "shape", "names", "requires_grad", "presence")),
    ],
)
def test_an_apply_that_does_not_refuse_is_told(model, stand_in, wrong):
    stand_in("plan", "apply", wrong)
    with pytest.raises(AssertionError, match=r"refused|without"):
        check_plan_is_pure(model, bf16)


def damaging_undo(undo):
    def apply_with(plan, model, **options):
        report = apply(plan, model, **options)
        return attrs.evolve(report, undo_cast=lambda: undo(report, model))

    return apply_with


def nothing(report, model):
    pass


def dtypes_only(report, model):
    for parameter in model.parameters():
        parameter.grad_dtype = None
        parameter.data = parameter.data.float()


def again_and_again(report, model):
    with contextlib.suppress(RuntimeError):
        report.undo()


@pytest.mark.parametrize("undo", [nothing, dtypes_only, again_and_again])
def test_an_undo_that_is_none_is_told(model, stand_in, undo):
    check_undo(model, bf16)
    stand_in("inverse", "apply", damaging_undo(undo))
    with pytest.raises(AssertionError, match="undo"):
        check_undo(model, bf16)


def test_an_undo_that_overwrites_edits_is_told(stand_in):
    def careless(report, model):
        if model.weight.dtype == torch.float32:
            return report.undo()
        model.weight.data = original.clone()
        return None

    model = nn.Linear(1, 1, bias=False)
    original = model.weight.data.clone()
    stand_in("inverse", "apply", damaging_undo(careless))
    with pytest.raises(AssertionError, match=r"second undo|edited"):
        check_undo(model, bf16)


def test_an_inverse_that_brings_nothing_back_is_told(model, stand_in):
    check_inverse(model, bf16)
    stand_in("inverse", "apply", lambda plan, model: plan.dtype and apply(plan, model))
    with pytest.raises(AssertionError, match="inverse"):
        check_inverse(model, bf16)


def test_an_inverse_that_splits_is_told(model, stand_in):
    def splitting(plan, model):
        apply(plan, model)
        if plan.dtype is None:
            model.left.data = model.left.data.clone()

    stand_in("inverse", "apply", splitting)
    with pytest.raises(AssertionError, match="left and right"):
        check_inverse(model, bf16)


@pytest.fixture
def adapted():
    layer = nn.Linear(2, 2).requires_grad_(False)
    layer.lora = nn.Linear(2, 2)
    return nn.ModuleDict({"layer": layer, "tower": nn.Linear(2, 2).requires_grad_(False)})


@pytest.mark.parametrize(("asked", "done"), [("base", "all"), ("all", "base"), ("none", "base")])
def test_a_frozen_plan_of_another_kind_is_told(adapted, stand_in, asked, done):
    check_frozen_plan(adapted, bf16, asked)
    stand_in("frozen", "frozen_cast_plan", lambda m, d, **_: frozen_cast_plan(m, d, mixed=done))
    with pytest.raises(AssertionError, match=r"layer.*must be planned as"):
        check_frozen_plan(adapted, bf16, asked)


def test_a_frozen_cast_that_rounds_what_is_trained_is_told(adapted, stand_in):
    def rounding(plan, model):
        apply(plan, model)
        model["layer"].lora.weight.data = model["layer"].lora.weight.data.bfloat16().float()

    stand_in("frozen", "apply", rounding)
    with pytest.raises(AssertionError, match=r"lora\.weight has other bits"):
        check_frozen_plan(adapted, bf16)
