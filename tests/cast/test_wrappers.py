from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from automodel_fn import (
    ConfigError,
    apply,
    bf16,
    cast_plan,
    fp32,
    frozen_cast_plan,
    temporary_cast,
)


def make():
    return nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))


# Adds one to what a backward gives, in place of a sum over ranks.
def reduces(ddp, dtype):
    ddp.zero_grad()
    ddp(torch.ones(1, 2, dtype=dtype)).sum().backward()
    return ddp.module[1].bias.grad.tolist() == [2.0, 2.0]


@pytest.fixture
def ddp(gloo):
    def wrap(model):
        def hook(state, bucket):
            done = torch.futures.Future()
            done.set_result(bucket.buffer() + 1)
            return done

        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(None, hook)
        return wrapped

    return wrap


def test_torch_s_own_cast_of_a_replicated_model_ends_its_reduction(ddp):
    model = ddp(make())
    assert reduces(model, fp32)

    model.to(bf16)

    assert not reduces(model, bf16)


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: apply(cast_plan(model, bf16)),
        lambda model: apply(cast_plan(make(), bf16), model),
        lambda model: temporary_cast(model, bf16).__enter__(),
    ],
    ids=["apply", "apply another's", "temporary_cast"],
)
def test_what_would_end_the_reduction_of_a_replicated_model_is_refused(ddp, state_of, cast):
    model = ddp(make())
    before = state_of(model)

    with pytest.raises(ConfigError, match=r"'' \(DistributedDataParallel\): 4 .*'0.weight'"):
        cast(model)

    assert state_of(model).differences(before) == []
    assert reduces(model, fp32)


def test_what_a_wrapper_does_not_hold_is_cast(ddp):
    model = make()
    model[0].requires_grad_(False)
    model.register_buffer("table", torch.ones(2))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["1.weight"])
    wrapped = ddp(model)

    apply(frozen_cast_plan(wrapped, bf16))
    assert model[0].weight.dtype == bf16
    apply(cast_plan(wrapped, bf16, keep_fp32="1.bias"))

    assert (model[1].weight.dtype, model.table.dtype, model[1].bias.dtype) == (bf16, bf16, fp32)


def test_a_model_cast_before_it_is_replicated_reduces(ddp):
    model = make()
    apply(cast_plan(model, bf16))

    assert reduces(ddp(model), bf16)


def test_what_fsdp1_has_flattened_is_refused(gloo):
    frozen = make().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single rank, which has nothing to shard
        model = FullyShardedDataParallel(
            frozen, use_orig_params=True, device_id=torch.device("cpu")
        )

    with pytest.raises(ConfigError, match=r"FullyShardedDataParallel\): 4 .*'0.weight'"):
        apply(cast_plan(model, bf16))
    apply(cast_plan(model, fp32))
