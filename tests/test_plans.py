import attrs
import pytest
from torch import nn

from automodel_fn import ConfigError, Plan, Row, apply, bf16, cast_plan, frozen_cast_plan


def row(**changes):
    fields = {"before": "float32", "after": "bfloat16", "action": "cast", "reason": "to bfloat16"}
    return Row("layer.weight", **(fields | changes))


def test_a_row_is_a_value():
    assert row() == row()
    assert hash(row()) == hash(row())
    assert row(after="float16") != row()
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        row().after = "float16"


def test_a_row_needs_words_and_has_zero_sizes():
    assert (row().shape, row().num_aliases, row().bytes_before, row().bytes_after) == ("", 0, 0, 0)
    with pytest.raises(TypeError):
        Row("layer.weight")
    with pytest.raises(TypeError):
        Row("layer.weight", "float32", "bfloat16", "cast", "to bfloat16")


@pytest.mark.parametrize("planner", [cast_plan, frozen_cast_plan])
def test_what_the_planners_return_is_a_plan(planner):
    plan = planner(nn.Linear(2, 2).requires_grad_(False), bf16)
    assert isinstance(plan, Plan)
    assert [(r.name, r.before, r.after) for r in plan.rows()] == [
        ("weight", "float32", "bfloat16"),
        ("bias", "float32", "bfloat16"),
    ]


def test_what_has_no_rows_or_no_notes_is_no_plan():
    class OnlyNotes:
        notes = ()

    class OnlyRows:
        def rows(self):
            return ()

    class Both(OnlyNotes, OnlyRows):
        pass

    assert isinstance(Both(), Plan)
    assert not isinstance(OnlyNotes(), Plan)
    assert not isinstance(OnlyRows(), Plan)


@pytest.mark.parametrize("wrong", [None, {}, "plan", bf16, row(), nn.Linear(2, 2)], ids=repr)
def test_applying_what_is_no_plan_is_an_error_that_names_its_type(wrong):
    with pytest.raises(ConfigError, match=f"plan={type(wrong).__name__} is not a plan"):
        apply(wrong)


def test_applying_model_and_plan_in_the_wrong_order_changes_nothing():
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError):
        apply(model, cast_plan(model, bf16))
    assert model.weight.dtype.itemsize == 4


def test_a_new_kind_of_plan_can_register_its_apply():
    @attrs.frozen
    class Renaming:
        notes: tuple[str, ...] = ()

    @apply.register
    def _(plan: Renaming, model=None, *, keep_originals=False, checksum=False):
        return ("renamed", model, keep_originals)

    assert apply(Renaming(), 5, keep_originals=True) == ("renamed", 5, True)


def test_the_options_of_apply_are_given_by_name():
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError):
        apply(cast_plan(model, bf16), model, True)
    with pytest.raises(TypeError):
        apply(cast_plan(model, bf16), model, keep_original=True)
    assert model.weight.dtype.itemsize == 4
