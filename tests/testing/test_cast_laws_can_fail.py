import pytest
import torch
from torch import nn

from automodel_fn import apply, bf16, cast_plan
from automodel_fn.testing import check_aliases_kept, check_all_or_nothing, check_cast_exact


def rounds_a_pin(model):
    model["norm"].weight.data = model["norm"].weight.data.bfloat16().float()


def moves_a_pin(model):
    model["norm"].weight.data = model["norm"].weight.data.clone()


def replaces_a_pin(model):
    model["norm"].weight = nn.Parameter(model["norm"].weight.data)


def casts_a_pin(model):
    model["norm"].weight.data = model["norm"].weight.data.bfloat16()


def rounds_float64(model):
    model.wide.data = model.wide.data.float().double()


def is_off_by_one_bit(model):
    model["wo"].weight.data.view(torch.int16)[0] += 1


def loses_a_gradient(model):
    model["wo"].weight.grad = None


def freezes(model):
    model["wo"].weight.requires_grad_(False)


def forgets_a_tensor(model):
    model["wo"].weight.grad_dtype = None
    model["wo"].weight.data = model["wo"].weight.data.float()


def splits_a_tie(model):
    model["wo"].tied = nn.Parameter(model["wo"].weight.data)


def splits_a_storage(model):
    model.left.data = model.left.data.clone()


def joins_two_tensors(model):
    model["norm"].weight = model["wo"].weight


def moves_a_view(model):
    model.left.data = torch.ones(8, dtype=bf16)
    model.right.data = model.left.data[3:7]


def drops_a_name(model):
    del model["wo"].tied


def damaging(damage):
    def apply_and_damage(plan, model=None, **options):
        report = apply(plan, model, **options)
        damage(model)
        return report

    return apply_and_damage


@pytest.mark.parametrize(
    "damage",
    [
        rounds_a_pin,
        moves_a_pin,
        replaces_a_pin,
        casts_a_pin,
        rounds_float64,
        is_off_by_one_bit,
        loses_a_gradient,
        freezes,
        forgets_a_tensor,
        splits_a_tie,
        drops_a_name,
    ],
)
def test_a_cast_that_is_not_exact_is_told(model, stand_in, damage):
    check_cast_exact(model, bf16)
    stand_in("cast", "apply", damaging(damage))
    with pytest.raises(AssertionError, match=r"weight|wide|tied"):
        check_cast_exact(model, bf16)


@pytest.mark.parametrize(
    "damage", [splits_a_tie, splits_a_storage, joins_two_tensors, moves_a_view, drops_a_name]
)
def test_a_cast_that_splits_or_joins_is_told(model, stand_in, damage):
    check_aliases_kept(model, bf16)
    stand_in("cast", "apply", damaging(damage))
    with pytest.raises(AssertionError, match=r"weight|left|right|tied|names"):
        check_aliases_kept(model, bf16)


@pytest.mark.parametrize("options", [{"skip": "wo"}, {"keep_fp32": "wo"}, {"match": "segment"}])
def test_a_plan_that_ignores_its_options_is_told(model, stand_in, options):
    model._keep_in_fp32_modules = ["nor"]
    check_cast_exact(model, bf16, **options)
    stand_in("cast", "cast_plan", lambda model, dtype, **_: cast_plan(model, dtype))
    with pytest.raises(AssertionError, match="must be planned as"):
        check_cast_exact(model, bf16, **options)


def without_a_way_back(plan, model, **_):
    for entry in plan.entries:
        tensor = model.get_parameter(entry.name)
        tensor.grad = None
        tensor.data = tensor.data.to(entry.to_dtype)


def never_raising(plan, model, **options):
    try:
        return apply(plan, model, **options)
    except MemoryError:
        return None


def always_finishing(plan, model, *, keep_originals):
    try:
        return apply(plan, model, keep_originals=keep_originals)
    except MemoryError:
        if keep_originals:
            apply(plan, model)
        raise


@pytest.mark.parametrize("wrong", [without_a_way_back, never_raising, always_finishing])
def test_a_cast_that_stops_in_between_is_told(model, stand_in, wrong):
    check_all_or_nothing(model, bf16)
    stand_in("atomic", "apply", wrong)
    with pytest.raises(AssertionError, match=r"conversion|left and right"):
        check_all_or_nothing(model, bf16)


def test_laws_leave_the_model_that_they_are_given_alone(model):
    before = {name: (id(p), p.dtype, p._version) for name, p in model.named_parameters()}
    for law in (check_cast_exact, check_aliases_kept, check_all_or_nothing):
        law(model, bf16)
    assert {name: (id(p), p.dtype, p._version) for name, p in model.named_parameters()} == before


def test_places_to_fail_can_be_limited(stand_in):
    tried = []

    def counted(plan, model, **options):
        tried.append(plan)
        return apply(plan, model, **options)

    stand_in("atomic", "apply", counted)
    check_all_or_nothing(nn.Sequential(*[nn.Linear(1, 1) for _ in range(9)]), bf16, max_places=3)
    assert len(tried) == 2 * (1 + 3)
