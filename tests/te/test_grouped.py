import types
from functools import partial

import pytest
import torch
from torch.autograd import gradgradcheck

from automodel_fn import build, cache_counts, step_context
from automodel_fn.te._grouped import GroupedLinears, _split, joined, row_multiple


def recipe(**kinds):
    made = types.SimpleNamespace(**kinds)
    for name in ("mxfp8", "nvfp4", "custom"):
        setattr(made, name, partial(bool, kinds.get(name, False)))
    return made


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ({}, 16),
        ({"mxfp8": True}, 32),
        ({"nvfp4": True}, 128),
        ({"custom": True, "quantization_alignment": 64}, 64),
        ({"custom": True}, 128),
    ],
)
def test_of_how_many_rows_a_recipe_needs_a_multiple(kinds, expected):
    assert row_multiple(recipe(**kinds)) == expected


@pytest.mark.parametrize(("given", "expected"), [(None, 1), (recipe(mxfp8=True), 32)])
def test_without_a_recipe_any_number_of_rows_will_do(given, expected):
    product = GroupedLinears()
    product._read_recipe = lambda: given

    assert product.multiple() == expected


def test_a_stack_that_was_split_has_second_derivatives():
    stacked = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)

    # The gradients of a stack lie as one.
    assert gradgradcheck(lambda x: torch.stack(_split(x)).pow(3), (stacked,))


def test_parts_that_lie_as_a_stack_are_one():
    whole = torch.arange(24.0).view(3, 2, 4)
    found = joined(whole.unbind(0))

    assert found.data_ptr() == whole.data_ptr()
    assert torch.equal(found, whole)
    assert found.is_contiguous()


@pytest.mark.parametrize(
    "parts",
    [
        lambda whole: (whole[1], whole[0], whole[2]),
        lambda whole: (whole[0], whole[2]),
        lambda whole: (whole[0], whole[1].clone(), whole[2]),
        lambda whole: tuple(whole.mT.unbind(0)),
        lambda whole: (whole[0], whole[0]),
        lambda whole: (whole[0], whole[1].view(torch.int32), whole[2]),
    ],
)
def test_parts_that_do_not_are_copied(parts):
    whole = torch.arange(24.0).view(3, 2, 4)
    found = joined(parts(whole))

    assert torch.equal(found, torch.stack(parts(whole)))
    assert found.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()


@pytest.mark.usefixtures("installed_stand_ins")
def test_modules_beside_experts_are_counted():
    made = build.experts(3, 8, 16, backend="te", dtype="fp32")
    x, weights, chosen = torch.randn(4, 8), torch.rand(4, 1), torch.zeros(4, 1).long()
    for first in (True, False):
        with step_context(first_microbatch=first):
            made(x, weights, chosen)

    assert (cache_counts(made).filled, cache_counts(made).reused) == (2, 2)
