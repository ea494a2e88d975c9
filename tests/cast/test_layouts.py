from __future__ import annotations

import pytest
import torch
from torch import nn

from automodel_fn import apply, bf16, cast_plan, restore, snapshot, temporary_cast


@pytest.fixture
def with_expanded(make_holder, special):
    row = special(1, 4)
    return make_holder(row=nn.Parameter(row[0]), table=row.expand(3, 4))


def test_an_expanded_view_stays_one_with_the_storage_that_it_shares(with_expanded, same_bits):
    model = with_expanded
    expected = model.table.to(bf16)

    apply(cast_plan(model, bf16))

    assert same_bits(model.table, expected)
    assert model.table.stride() == (0, 1)
    with torch.no_grad():
        model.row[1] = 7.0
    assert model.table[:, 1].tolist() == [7.0] * 3


def test_an_expanded_view_comes_back_from_undo_and_from_a_temporary_cast(with_expanded, state_of):
    model = with_expanded
    before = state_of(model)

    apply(cast_plan(model, bf16), keep_originals=True).undo()
    with temporary_cast(model, bf16):
        assert model.table.stride() == (0, 1)

    assert state_of(model).differences(before) == []
    assert model.table.stride() == (0, 1)


@pytest.mark.parametrize("then", [None, bf16])
def test_an_edit_shows_in_an_expanded_view_after_a_temporary_cast(with_expanded, then):
    with temporary_cast(with_expanded, bf16, then=then), torch.no_grad():
        with_expanded.row[1] = 7.0

    assert with_expanded.table[:, 1].tolist() == [7.0] * 3
    assert with_expanded.table.stride() == (0, 1)


def test_an_expanded_view_is_restored(with_expanded, state_of):
    before, saved = state_of(with_expanded), snapshot(with_expanded)

    apply(cast_plan(with_expanded, bf16))
    restore(saved)

    assert state_of(with_expanded).differences(before) == []


def test_a_convolution_in_channels_last_stays_so(special, same_bits):
    model = nn.Conv2d(3, 2, 2).to(memory_format=torch.channels_last)
    model.weight.data.copy_(special(2, 3, 2, 2))
    strides, expected = model.weight.stride(), model.weight.detach().to(bf16)

    apply(cast_plan(model, bf16))

    assert model.weight.stride() == strides
    assert same_bits(model.weight, expected)


# A CPU gives NaN other bits where it converts memory with gaps.
def test_views_that_lie_between_one_another_have_the_nans_of_their_own_casts(special, same_bits):
    flat = special(40)
    model = nn.Module()
    model.even, model.odd = nn.Parameter(flat[::2]), nn.Parameter(flat[1::2])
    expected = model.even.detach().to(bf16), model.odd.detach().to(bf16)

    apply(cast_plan(model, bf16))

    assert same_bits(model.even.contiguous(), expected[0])
    assert same_bits(model.odd.contiguous(), expected[1])


def test_views_of_one_storage_of_which_one_is_negated_keep_their_values():
    z = torch.tensor([1 + 2j, 3 + 4j])
    model = nn.Module()
    model.register_buffer("plain", z.imag)
    model.register_buffer("negated", z.conj().imag)
    expected = model.plain.tolist(), model.negated.tolist()

    apply(cast_plan(model, bf16))

    assert (model.plain.tolist(), model.negated.tolist()) == expected
