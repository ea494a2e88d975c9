from __future__ import annotations

import pytest
import torch
from torch import nn

from automodel_fn import ConfigError, bf16, cast_plan, fp16, fp32, temporary_cast

DTYPES = pytest.mark.parametrize("dtype", [bf16, fp16, fp32])


class Stop(Exception):
    pass


@DTYPES
def test_untouched_elements_have_their_old_bits(zoo, state_of, dtype):
    before = state_of(zoo)

    with temporary_cast(zoo, dtype):
        pass

    assert state_of(zoo).differences(before) == []


@DTYPES
def test_inside_every_float_has_the_dtype_pins_and_buffers_included(
    zoo, left_alone, tensors_of, dtype
):
    before = {name: tensor.dtype for name, tensor in tensors_of(zoo).items()}

    with temporary_cast(zoo, dtype) as model:
        assert model is zoo
        inside = {name: tensor.dtype for name, tensor in tensors_of(zoo).items()}

    alone = (*left_alone, "four_bits")
    assert {inside[name] for name in inside if name not in alone} == {dtype}
    assert all(inside[name] == before[name] for name in alone)


@DTYPES
def test_after_an_error_the_model_is_as_before_and_the_error_passes(zoo, state_of, dtype):
    before = state_of(zoo)

    with pytest.raises(Stop), temporary_cast(zoo, dtype):
        raise Stop

    assert state_of(zoo).differences(before) == []


def test_edits_are_rounded_and_the_rest_keeps_its_bits(make_holder, special, same_bits):
    before = special(20)
    model = make_holder(weight=nn.Parameter(before.clone()))

    with temporary_cast(model, bf16), torch.no_grad():
        model.weight[7] = 3.001
        model.weight[0] = 0.0

    before[7], before[0] = torch.tensor(3.001).to(bf16), 0.0
    assert same_bits(model.weight, before)


def test_edits_of_a_wider_cast_are_rounded_once(make_holder, same_bits):
    model = make_holder(weight=nn.Parameter(torch.tensor([1.5, -0.0, 2.0], dtype=bf16)))

    with temporary_cast(model, fp32), torch.no_grad():
        model.weight[2] = 1.001

    assert same_bits(model.weight, torch.tensor([1.5, -0.0, 1.001]).to(bf16))


def test_a_bf16_model_is_initialized_in_fp32(same_bits):
    model, reference = nn.Linear(8, 8).to(bf16), torch.empty(8, 8)

    with temporary_cast(model, fp32):
        torch.manual_seed(1)
        nn.init.trunc_normal_(model.weight, std=0.02)

    torch.manual_seed(1)
    nn.init.trunc_normal_(reference, std=0.02)
    assert same_bits(model.weight, reference.to(bf16))


@pytest.mark.parametrize("stored", [fp16, bf16])
def test_every_pattern_survives_a_wider_cast(make_holder, same_bits, stored):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(stored)
    model = make_holder(table=every.clone())

    with temporary_cast(model, fp32):
        pass

    assert same_bits(model.table, every)


def test_each_tensor_of_a_mixed_model_gets_its_own_dtype_back(state_of):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(bf16), nn.Linear(2, 2).to(fp16))
    before = state_of(model)

    with temporary_cast(model, fp32):
        pass

    assert state_of(model).differences(before) == []


def make():
    return nn.ModuleDict({"mlp": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})


@DTYPES
def test_then_gives_the_dtypes_of_a_plan_made_from_the_old_bits(
    zoo, tensors_of, entry_of, same_bits, dtype
):
    plan = cast_plan(zoo, bf16)
    expected = {n: t.detach().to(entry_of(plan, n).to_dtype) for n, t in tensors_of(zoo).items()}

    with temporary_cast(zoo, dtype, then=bf16):
        pass

    assert [n for n, t in tensors_of(zoo).items() if not same_bits(t, expected[n])] == []


def test_then_takes_edits(special):
    model = make()

    with temporary_cast(model, fp32, then=bf16), torch.no_grad():
        model["mlp"].weight.fill_(1.001)

    assert torch.equal(model["mlp"].weight, torch.full((2, 2), 1.001).to(bf16))


@pytest.mark.parametrize("is_edited", [False, True])
@DTYPES
def test_pins_are_exact_after_then(special, same_bits, dtype, is_edited):
    model = make()
    model._keep_in_fp32_modules = ["norm"]
    model["norm"].weight = nn.Parameter(special(20)[3:5].clone())
    expected = model["norm"].weight.detach().clone()

    with temporary_cast(model, dtype, then="bf16"):
        if is_edited:
            model["norm"].weight.data[0] = expected[0] = 3.0

    assert same_bits(model["norm"].weight, expected)
    assert model["mlp"].weight.dtype == bf16


@pytest.mark.parametrize(("dtype", "then"), [("bf17", None), (torch.float64, None), (bf16, "int8")])
def test_other_dtypes_are_refused_before_anything_changes(state_of, dtype, then):
    model = make()
    before = state_of(model)

    with pytest.raises(ConfigError), temporary_cast(model, dtype, then):
        pass

    assert state_of(model).differences(before) == []


def test_a_parameter_replaced_inside_gets_the_dtype_of_the_one_before(same_bits):
    model = make().to(bf16)

    with temporary_cast(model, fp32):
        model["mlp"].weight = nn.Parameter(torch.full((2, 2), 1.001))

    assert same_bits(model["mlp"].weight, torch.full((2, 2), 1.001).to(bf16))


@pytest.mark.parametrize("is_fresh", [False, True])
def test_gradients_follow_their_tensors(is_fresh):
    model = make().to(bf16)
    if not is_fresh:
        model["mlp"].weight.grad = torch.ones(2, 2, dtype=bf16)

    with temporary_cast(model, fp32):
        assert is_fresh or model["mlp"].weight.grad.dtype == fp32
        model["norm"](model["mlp"](torch.ones(1, 2))).sum().backward()

    assert {p.grad.dtype for p in model.parameters()} == {bf16}


def test_gradients_from_before_have_their_old_bits(special, state_of):
    model = make()
    model["mlp"].weight.grad = special(2, 2)
    before = state_of(model)

    with temporary_cast(model, bf16):
        pass

    assert state_of(model).differences(before) == []


def shares(left, right):
    return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


@DTYPES
@pytest.mark.parametrize("then", [None, bf16, fp16, fp32])
def test_tensors_that_share_a_storage_share_one_inside_and_afterwards(zoo, dtype, then):
    with temporary_cast(zoo, dtype, then=then):
        assert shares(zoo.left, zoo.right)
        with torch.no_grad():
            zoo.right[0] = 5.0
        assert zoo.left[8].item() == 5.0

    assert shares(zoo.left, zoo.right)
    assert zoo.left[8].item() == zoo.right[0].item() == 5.0


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("dtype", [bf16, fp16])
def test_views_with_gaps_have_their_old_bits(make_holder, special, state_of, step, dtype):
    flat = special(64)
    flat.view(torch.int32)[::4] = 0x7F800123
    model = make_holder(a=nn.Parameter(flat[:40]), b=nn.Parameter(flat[20::step]))
    before = state_of(model)

    with temporary_cast(model, dtype):
        pass

    assert state_of(model).differences(before) == []


def test_casts_nest(zoo, state_of):
    before = state_of(zoo)

    with temporary_cast(zoo, bf16):
        with temporary_cast(zoo, fp16):
            assert zoo.special.dtype == fp16
        assert zoo.special.dtype == bf16

    assert state_of(zoo).differences(before) == []


@DTYPES
def test_strides_survive(zoo, dtype):
    with temporary_cast(zoo, dtype):
        assert zoo.transposed.stride() == (1, 6)

    assert zoo.transposed.stride() == (1, 6)


def test_a_storage_read_from_outside_is_followed_again(special):
    flat, model = special(8), nn.LayerNorm(4)
    model.weight = nn.Parameter(flat[4:])

    with temporary_cast(model, bf16), torch.no_grad():
        model.weight[1] = 3.0

    assert flat[5].item() == 3.0
    assert model.weight.data_ptr() == flat[4:].data_ptr()


def test_what_pytorch_negates_on_reading_comes_back(make_holder):
    turned = torch.tensor([1.001 + 2j, -3.003j]).conj()
    model = make_holder(negated=turned.imag)
    expected = turned.imag.tolist()

    with temporary_cast(model, bf16):
        assert model.negated.tolist() == [-2.0, 3.0]

    assert model.negated.is_neg()
    assert model.negated.tolist() == expected


def test_a_module_that_is_not_initialized_put_in_inside_keeps_nothing_from_coming_back(state_of):
    model = make().to(bf16)
    before = state_of(model)

    with pytest.raises(ConfigError, match=r"late\.weight"), temporary_cast(model, fp32):
        model["late"] = nn.LazyLinear(2)

    del model["late"]
    assert state_of(model).differences(before) == []


def test_the_notes_of_the_plan_afterwards_are_logged_once(caplog):
    model = make()
    model._keep_in_fp32_modules = ["nothing_of_this_name"]

    with temporary_cast(model, fp16), temporary_cast(model, fp32, then=bf16):
        pass

    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "keyword 'nothing_of_this_name'" in record.getMessage()


def test_an_expanded_tensor_takes_no_more_memory_afterwards(make_holder, special):
    model = make_holder(wide=nn.Parameter(special(1, 5).expand(3, 5)))

    with temporary_cast(model, bf16):
        pass

    assert model.wide.stride() == (0, 1)
