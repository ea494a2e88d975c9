from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from automodel_fn import (
    ConfigError,
    StalePlanError,
    apply,
    bf16,
    cast_plan,
    fp32,
    restore,
    snapshot,
)


def make():
    return nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))


def test_a_restore_brings_every_bit_back(zoo, state_of, scramble):
    before, saved = state_of(zoo), snapshot(zoo)
    scramble(zoo)

    restore(saved)

    assert state_of(zoo).differences(before) == []


@pytest.mark.parametrize("buffers", ["all", "none"])
def test_a_restore_brings_every_bit_back_over_a_cast(zoo, state_of, buffers):
    before, saved = state_of(zoo), snapshot(zoo)
    apply(cast_plan(zoo, bf16, buffers=buffers))

    restore(saved)

    assert state_of(zoo).differences(before) == []


def test_a_snapshot_can_be_restored_again(zoo, state_of, scramble):
    before, saved = state_of(zoo), snapshot(zoo)

    for _ in range(2):
        restore(saved)
        scramble(zoo)
    restore(saved)

    assert state_of(zoo).differences(before) == []


def test_a_snapshot_does_not_touch_the_model(zoo, state_of):
    before = state_of(zoo)

    snapshot(zoo)

    assert state_of(zoo).differences(before) == []


def test_a_restored_model_shares_no_memory_with_its_snapshot(state_of, scramble):
    model = make()
    before, saved = state_of(model), snapshot(model)
    restore(saved)
    scramble(model)

    restore(saved)

    assert state_of(model).differences(before) == []


def test_only_what_is_named_is_saved_and_restored(same_bits, scramble):
    model = make()
    saved, weight = snapshot(model, ["0.weight", "1"]), model[0].weight.detach().clone()
    scramble(model)
    bias = model[0].bias.detach().clone()

    restore(saved)

    assert saved.names == ("0.weight", "1.weight", "1.bias")
    assert same_bits(model[0].weight, weight)
    assert same_bits(model[0].bias, bias)


def test_a_name_that_matches_nothing_is_an_error():
    with pytest.raises(ConfigError, match=r"names='0\.wieght'.*near: 0\.weight"):
        snapshot(make(), "0.wieght")


def test_a_snapshot_knows_its_size():
    assert snapshot(make()).num_bytes == (4 + 2 + 2 + 2) * 4


def test_ties_and_shared_buffers_are_saved_once_and_stay(zoo, scramble):
    saved = snapshot(zoo)
    scramble(zoo)

    restore(saved)

    assert saved.names.count("embed.weight") == 1
    assert "head.weight" not in saved.names
    assert zoo.head.weight is zoo.embed.weight
    assert zoo.blocks[0].table is zoo.blocks[1].table


def shares(left, right):
    return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


@pytest.mark.parametrize("names", [None, "left", "right", ["left", "right"]])
@pytest.mark.parametrize("is_cast", [True, False])
def test_tensors_that_share_a_storage_share_one_afterwards(zoo, names, is_cast, same_bits):
    left = zoo.left.detach().clone()
    saved = snapshot(zoo, names)
    if is_cast:
        apply(cast_plan(zoo, bf16))
    restore(saved)

    assert shares(zoo.left, zoo.right)
    assert zoo.left.data_ptr() + 8 * zoo.left.itemsize == zoo.right.data_ptr()
    assert names == "right" or same_bits(zoo.left, left)


@pytest.mark.parametrize("name", ["transposed", "special", "embed.weight"])
def test_strides_survive(zoo, name):
    before = zoo.get_parameter(name).stride()
    saved = snapshot(zoo)
    apply(cast_plan(zoo, bf16))

    restore(saved)

    assert zoo.get_parameter(name).stride() == before


def test_gradients_are_left_as_they_are(scramble):
    model = make()
    model(torch.ones(1, 2)).sum().backward()
    saved, grad = snapshot(model), model[0].weight.grad

    scramble(model)
    restore(saved)

    assert model[0].weight.grad is grad


def test_a_snapshot_of_one_model_can_be_restored_into_another(same_bits):
    model, other = make(), make().to(bf16)

    restore(snapshot(model), other)

    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(same_bits(left, right) for left, right in pairs)
    assert not shares(model[0].weight, other[0].weight)


def test_a_snapshot_does_not_keep_its_model_alive():
    model = make()
    saved = snapshot(model)
    del model
    gc.collect()

    with pytest.raises(ConfigError, match="model=None"):
        restore(saved)


def reshape(model):
    model[0].bias = nn.Parameter(torch.ones(3))
    model[1].bias = nn.Parameter(torch.ones(1, 2))


def untie_names(model):
    model[0].bias = model[1].bias


def to_meta(model):
    model[0].to("meta")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (reshape, [r"0\.bias: shape", r"1\.bias: shape"]),
        (untie_names, [r"0\.bias: names", r"1\.bias: names"]),
        (to_meta, [r"0\.weight: device", r"0\.bias: device"]),
    ],
)
def test_a_snapshot_that_does_not_fit_lists_everything_and_changes_nothing(
    change, names, state_of, scramble
):
    model = make()
    saved = snapshot(model)
    change(model)
    if change is not to_meta:
        scramble(model)
        before = state_of(model)

    with pytest.raises(StalePlanError, match=r"[\s\S]*".join(["2 differences", *names])):
        restore(saved)

    if change is not to_meta:
        assert state_of(model).differences(before) == []


def test_the_model_may_have_tensors_that_were_not_saved():
    model = make()
    saved = snapshot(model)
    model.register_buffer("more", torch.ones(1))

    restore(saved)

    assert model.more.item() == 1.0


def test_a_sparse_tensor_has_no_copy(make_holder):
    with pytest.raises(ConfigError, match=r"1 tensors[\s\S]*table"):
        snapshot(make_holder(table=torch.eye(2).to_sparse()))


def test_training_goes_on_after_a_restore():
    model = make()
    saved, optimizer = snapshot(model), torch.optim.AdamW(model.parameters())
    restore(saved)

    before = model[0].weight.detach().clone()
    model(torch.randn(1, 2)).square().sum().backward()
    optimizer.step()

    assert model[0].weight.dtype == fp32
    assert not torch.equal(model[0].weight, before)
