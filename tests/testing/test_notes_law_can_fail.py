import attrs
import pytest
import torch
from torch import nn

from automodel_fn import bf16, cast_plan
from automodel_fn.testing import check_notes


@pytest.fixture
def noted():
    model = nn.ModuleDict({"word_norm": nn.LayerNorm(2), "norm": nn.LayerNorm(2).half()})
    model._keep_in_fp32_modules = ["norm", "gate"]
    return model


@pytest.mark.parametrize("match", ["substring", "segment"])
@pytest.mark.parametrize("text", ["matched nothing", "inside a name segment", "stored in less"])
def test_a_plan_that_keeps_something_to_itself_is_told(noted, stand_in, text, match):
    if (text, match) == ("inside a name segment", "segment"):
        pytest.skip("whole segments have no inside")

    def silent(model, dtype, **options):
        plan = cast_plan(model, dtype, **options)
        return attrs.evolve(plan, notes=tuple(n for n in plan.notes if text not in n))

    check_notes(noted, bf16, match=match)
    stand_in("notes", "cast_plan", silent)
    with pytest.raises(AssertionError, match=r"noted"):
        check_notes(noted, bf16, match=match)


@pytest.mark.parametrize(
    "note", ["keyword 'norm' of X.y matched nothing", "3 fp32 pins are stored in less"]
)
def test_a_plan_that_says_too_much_is_told(noted, stand_in, note):
    def chatty(model, dtype, **options):
        plan = cast_plan(model, dtype, **options)
        return attrs.evolve(plan, notes=(*plan.notes, note))

    stand_in("notes", "cast_plan", chatty)
    with pytest.raises(AssertionError, match="noted"):
        check_notes(noted, bf16)


def test_another_number_of_pins_with_lost_bits_is_told(noted, stand_in):
    def miscounted(model, dtype, **options):
        plan = cast_plan(model, dtype, **options)
        return attrs.evolve(plan, notes=tuple(n.replace("2 fp32", "1 fp32") for n in plan.notes))

    stand_in("notes", "cast_plan", miscounted)
    with pytest.raises(AssertionError, match="2 fp32 pins"):
        check_notes(noted, torch.bfloat16)
