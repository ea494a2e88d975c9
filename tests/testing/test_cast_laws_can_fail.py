import contextlib

import attrs
import pytest
import torch
from torch import nn

from automodel_fn import RangeLoss, apply, bf16, cast_plan, restore
from automodel_fn.testing import check_aliases_kept, check_all_or_nothing, check_cast_exact
from automodel_fn.testing._parts import mark
from automodel_fn.testing._twin import tensors_of


def lost(num_infinite, num_zero):
    return RangeLoss("weight", num_infinite=num_infinite, num_zero=num_zero)


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


def reads_a_pin(model):
    model["norm"].weight.sum()


def loses_an_attribute(model):
    del model["wo"].weight.is_marked


def loses_a_hook(model):
    model["wo"].weight._backward_hooks.clear()


def loses_a_hook_of_accumulation(model):
    model["wo"].weight._post_accumulate_grad_hooks.clear()


def replaces_a_gradient(model):
    model["wo"].weight.grad = model["wo"].weight.grad.clone()


def lies_otherwise(model):
    model.turned.data = model.turned.data.contiguous()


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
        reads_a_pin,
        loses_an_attribute,
        loses_a_hook,
        loses_a_hook_of_accumulation,
        replaces_a_gradient,
        lies_otherwise,
    ],
)
def test_a_cast_that_is_not_exact_is_told(model, stand_in, damage):
    mark(model["wo"].weight)
    model.turned = nn.Parameter(torch.ones(2, 3).t())
    check_cast_exact(model, bf16)
    stand_in("cast", "apply", damaging(damage))
    with pytest.raises(AssertionError, match=r"weight|wide|tied|turned"):
        check_cast_exact(model, bf16)


@pytest.mark.parametrize(
    "damage", [splits_a_tie, splits_a_storage, joins_two_tensors, moves_a_view, drops_a_name]
)
def test_a_cast_that_splits_or_joins_is_told(model, stand_in, damage):
    check_aliases_kept(model, bf16)
    stand_in("cast", "apply", damaging(damage))
    with pytest.raises(AssertionError, match=r"weight|left|right|tied|names"):
        check_aliases_kept(model, bf16)


@pytest.mark.parametrize("losses", [(), (lost(1, 0),), (lost(1, 1), lost(1, 1)), (lost(1, 2),)])
def test_a_wrong_count_of_what_leaves_the_range_is_told(stand_in, losses):
    model = nn.LayerNorm(3)
    model.weight.data.copy_(torch.tensor([1e6, 1e-9, 1.0]))

    def miscounting(plan, model):
        return attrs.evolve(apply(plan, model), range_losses=losses)

    check_cast_exact(model, torch.float16)
    stand_in("cast", "apply", miscounting)
    with pytest.raises(AssertionError, match="range of float16"):
        check_cast_exact(model, torch.float16)


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


def never_interrupted(plan, model, **options):
    try:
        return apply(plan, model, **options)
    except KeyboardInterrupt:
        return None


def always_finishing(plan, model, *, keep_originals=False):
    try:
        return apply(plan, model, keep_originals=keep_originals)
    except MemoryError:
        if keep_originals:
            apply(plan, model)
        raise


def dropping_hooks_on_failure(plan, model, **options):
    try:
        return apply(plan, model, **options)
    except KeyboardInterrupt:
        vars(model["wo"].weight).clear()
        raise


def with_an_undo_in_two_steps(plan, model, **options):
    report = apply(plan, model, **options)

    def undo():
        report.undo()
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()

    def undo_and_move():
        model.wide.data = model.wide.data.add(1)
        report.undo()
        model.wide.data = model.wide.data.sub(1)

    return attrs.evolve(report, undo_cast=undo_and_move if options else undo)


@pytest.mark.parametrize(
    "wrong",
    [
        without_a_way_back,
        never_raising,
        never_interrupted,
        always_finishing,
        dropping_hooks_on_failure,
        with_an_undo_in_two_steps,
    ],
)
def test_a_cast_that_stops_in_between_is_told(model, stand_in, wrong):
    model["wo"].weight.is_marked = True
    check_all_or_nothing(model, bf16)
    stand_in("atomic", "apply", wrong)
    with pytest.raises(AssertionError, match=r"operation|left and right|attributes"):
        check_all_or_nothing(model, bf16)


def restore_one_by_one(saved, model):
    for one in saved.tensors:
        tensor = dict(tensors_of(model))[one.names[0]]
        tensor.data = one.data.clone()


def restore_silently(saved, model):
    with contextlib.suppress(MemoryError):
        restore(saved, model)


@pytest.mark.parametrize("wrong", [restore_one_by_one, restore_silently])
def test_a_restore_that_stops_in_between_is_told(model, stand_in, wrong):
    stand_in("atomic", "restore", wrong)
    with pytest.raises(AssertionError, match=r"restore: Injected|left and right"):
        check_all_or_nothing(model, bf16, effects=["restore"])


@contextlib.contextmanager
def one_by_one(model, dtype):
    before = [parameter.data for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
        parameter.data = parameter.data.to(dtype)
    yield
    for parameter, data in zip(model.parameters(), before, strict=True):
        parameter.data = data + 0


@pytest.mark.parametrize("effect", ["enter temporary_cast", "leave temporary_cast"])
def test_a_temporary_cast_that_stops_in_between_is_told(stand_in, effect):
    stand_in("atomic", "temporary_cast", one_by_one)
    with pytest.raises(AssertionError, match=f"{effect}: Injected"):
        check_all_or_nothing(nn.Linear(2, 2), bf16, effects=[effect])


def test_laws_leave_the_model_that_they_are_given_alone(model):
    before = {name: (id(p), p.dtype, p._version) for name, p in model.named_parameters()}
    for law in (check_cast_exact, check_aliases_kept, check_all_or_nothing):
        law(model, bf16)
    assert {name: (id(p), p.dtype, p._version) for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("max_places", [1, 3])
def test_places_to_fail_can_be_limited(stand_in, max_places):
    tried = []

    def counted(plan, model, **options):
        tried.append(plan)
        return apply(plan, model, **options)

    stand_in("atomic", "apply", counted)
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(9)])
    check_all_or_nothing(model, bf16, effects=["apply"], max_places=max_places)
    assert 2 * 2 <= len(tried) <= 2 * (1 + max_places)
