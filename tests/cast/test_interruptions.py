from __future__ import annotations

import signal

import pytest
import torch
from torch import nn

from automodel_fn import (
    PartialCastError,
    apply,
    bf16,
    cast_plan,
    fp32,
    restore,
    snapshot,
    temporary_cast,
)
from automodel_fn.cast._batches import batches_of, conversions_of
from automodel_fn.cast._tensors import scan

CONVERSION = {"aten::_to_copy"}
COPY = {"aten::_to_copy", "aten::clone"}


def out_of_memory():
    raise MemoryError


def interrupt():
    raise KeyboardInterrupt


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


ACTS = pytest.mark.parametrize("act", [out_of_memory, interrupt, press_ctrl_c])
MODES = pytest.mark.parametrize("keep_originals", [False, True])
PLACES = pytest.mark.parametrize("names", [CONVERSION, None], ids=["conversions", "operators"])
WIDER = pytest.mark.parametrize("stored", [fp32, bf16], ids=["narrowing", "pin cast up"])


@pytest.fixture
def make(special):
    def make(stored=fp32):
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Embedding(3, 4), "b": nn.Linear(4, 3), "pin": nn.Module()})
        model["b"].weight = model["a"].weight
        model["pin"].weight = nn.Parameter(special(4).to(stored))
        flat = special(12)
        model.left, model.right = nn.Parameter(flat[:8]), nn.Parameter(flat[4:])
        model.transposed = nn.Parameter(special(2, 5).t())
        model.transposed.grad = special(5, 2)
        four_bits = torch.arange(6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
        model.four_bits = nn.Parameter(four_bits, requires_grad=False)
        model.register_buffer("table", special(3))
        model["b"].register_buffer("table", model.table)
        return model

    return make


def planned(model):
    return cast_plan(model, bf16, keep_fp32="pin")


# Whether the effect was interrupted; it must not hide that.
def run(effect, mode):
    try:
        with mode:
            effect()
    except (MemoryError, KeyboardInterrupt):
        return True
    assert mode.seen < mode.places.start, "an interruption was swallowed"
    return False


# Each place at which an effect can be interrupted, and how the model then differs from before and
# from after.
@pytest.fixture
def outcomes(make, state_of, at_operator):
    def outcomes(prepare, act, names, stored=fp32, times=1):
        done = make(stored)
        prepare(done)()
        after = state_of(done)
        for n in range(1, 1000):
            model = make(stored)
            effect = prepare(model)
            before = state_of(model)
            if not run(effect, at_operator(n, act, names=names, times=times)):
                assert n > 1
                return
            now = state_of(model)
            assert now.objects == before.objects
            yield n, now.differing_values(before), now.differing_values(after)

    return outcomes


@ACTS
@PLACES
@WIDER
def test_streaming_leaves_the_model_wholly_as_before_or_wholly_cast(outcomes, act, names, stored):
    def prepare(model):
        plan = planned(model)
        return lambda: apply(plan)

    for n, undone, unfinished in outcomes(prepare, act, names, stored):
        assert not undone or not unfinished, f"at {n}: {undone} and {unfinished}"


@ACTS
@PLACES
@WIDER
def test_an_apply_that_keeps_originals_rolls_back(outcomes, act, names, stored):
    def prepare(model):
        plan = planned(model)
        return lambda: apply(plan, keep_originals=True)

    for n, undone, _ in outcomes(prepare, act, names, stored):
        assert not undone, f"at {n}"


@ACTS
@PLACES
def test_an_undo_is_done_wholly_or_not_at_all(outcomes, act, names):
    def prepare(model):
        return apply(planned(model), keep_originals=True).undo

    for n, undone, unfinished in outcomes(prepare, act, names):
        assert not undone or not unfinished, f"at {n}: {undone} and {unfinished}"


@ACTS
def test_an_interrupted_undo_can_be_tried_again(make, state_of, at_operator, act):
    for n in range(1, 1000):
        model = make()
        before = state_of(model)
        report = apply(planned(model), keep_originals=True)
        cast = state_of(model)
        if not run(report.undo, at_operator(n, act)):
            break
        if not state_of(model).differences(cast):
            report.undo()
        assert state_of(model).differences(before) == [], f"at {n}"
    assert n > 1


@ACTS
@pytest.mark.parametrize("names", [COPY, None], ids=["copies", "operators"])
@pytest.mark.parametrize("is_cast", [False, True])
def test_a_restore_is_done_wholly_or_not_at_all(outcomes, act, names, is_cast, scramble):
    def prepare(model):
        saved = snapshot(model)
        scramble(model)
        if is_cast:
            apply(planned(model))
        return lambda: restore(saved)

    for n, undone, unfinished in outcomes(prepare, act, names):
        assert not undone or not unfinished, f"at {n}: {undone} and {unfinished}"


@ACTS
@PLACES
def test_a_temporary_cast_interrupted_on_entry_leaves_the_model_as_before(outcomes, act, names):
    def prepare(model):
        return temporary_cast(model, bf16).__enter__

    for n, undone, _ in outcomes(prepare, act, names):
        assert not undone, f"at {n}"


def edited(model):
    context = temporary_cast(model, bf16)
    context.__enter__()
    with torch.no_grad():
        model["b"].weight[1] = 3.25
    return lambda: context.__exit__(None, None, None)


@ACTS
@PLACES
def test_a_temporary_cast_interrupted_on_exit_still_ends(outcomes, act, names):
    for n, _, unfinished in outcomes(edited, act, names):
        assert not unfinished, f"at {n}"


@MODES
@pytest.mark.parametrize("times", [2, 5])
def test_several_interruptions_are_as_good_as_one(outcomes, keep_originals, times):
    def prepare(model):
        plan = planned(model)
        return lambda: apply(plan, keep_originals=keep_originals)

    for n, undone, unfinished in outcomes(prepare, out_of_memory, None, times=times):
        assert not undone or not unfinished, f"at {n}: {undone} and {unfinished}"


def test_a_cast_that_can_never_be_finished_lists_what_is_as_before(make, state_of, at_operator):
    model, done = make(), make()
    before = state_of(model)
    apply(planned(done))
    after = state_of(done)
    second_cast = 2

    with (
        at_operator(second_cast, out_of_memory, names=CONVERSION, times=10**6),
        pytest.raises(PartialCastError) as caught,
    ):
        apply(planned(model))

    now = state_of(model)
    unfinished = set(now.differing_values(after))
    assert unfinished
    assert not unfinished & set(now.differing_values(before))
    assert {"a.weight", "b.bias", "transposed", "transposed.grad", "table"} <= unfinished
    assert not {"left", "right"} & unfinished
    listed = {line.strip() for line in str(caught.value).splitlines()}
    assert listed >= {"a.weight", "b.bias", "transposed", "transposed.grad", "table"}


class Stubborn(torch.Tensor):
    """Can be tried with one element, but not be cast."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to and args[0].numel() > 1:
            raise ValueError("stubborn")
        return super().__torch_function__(func, types, args, kwargs or {})


class Unwilling(torch.Tensor):
    """Cannot be cast at all."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to:
            raise ValueError("unwilling")
        return super().__torch_function__(func, types, args, kwargs or {})


class Special(nn.Parameter):
    pass


@MODES
def test_a_kind_that_cannot_be_cast_is_found_on_trial_before_anything_is_converted(
    make_holder, at_operator, keep_originals
):
    model = make_holder(
        ordinary=nn.Parameter(torch.ones(3)),
        special=Special(torch.ones(5)),
        unwilling=torch.ones(3).as_subclass(Unwilling),
    )
    mode = at_operator(1, lambda: None, names=CONVERSION)

    with mode, pytest.raises(ValueError, match="unwilling") as caught:
        apply(cast_plan(model, bf16), keep_originals=keep_originals)

    assert caught.value.__notes__ == [
        "while trying one element of Unwilling, float32 to bfloat16; the model was not changed."
    ]
    # At most one element of the other kind that is tried.
    assert mode.seen <= 1


@MODES
@pytest.mark.parametrize("place", ["a_first", "z_last"])
def test_a_subclass_whose_conversion_raises_leaves_the_model_as_before(
    make, state_of, keep_originals, place
):
    model = nn.ModuleDict({"a_first": nn.Module(), "model": make(), "z_last": nn.Module()})
    model[place].table = nn.Buffer(torch.ones(3).as_subclass(Stubborn))
    before = state_of(model)

    with pytest.raises(ValueError, match="stubborn"):
        apply(planned_all(model), model, keep_originals=keep_originals)

    assert state_of(model).differences(before) == []


def planned_all(model):
    plan = cast_plan(model, bf16)
    assert any(entry.name.endswith("table") and entry.changes for entry in plan.entries)
    return plan


@pytest.mark.parametrize("kind", [nn.Parameter, Special])
def test_originals_of_ordinary_parameters_are_not_kept_while_streaming(make_holder, kind):
    model = make_holder(a=kind(torch.ones(3)), b=kind(torch.ones(4)))

    found = scan(model).tensors
    batches = batches_of(cast_plan(model, bf16).entries, found, groups=())
    conversions = conversions_of(batches, [item.tensor for item in found])

    assert conversions
    assert all(conversion.exchange().can_finish for conversion in conversions)
