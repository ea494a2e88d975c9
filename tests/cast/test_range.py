from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from automodel_fn import (
    PartialCastError,
    RangeLoss,
    apply,
    bf16,
    cast_plan,
    fp16,
    fp32,
    frozen_cast_plan,
)
from automodel_fn.cast import _range
from automodel_fn.cast._batches import batches_of, conversions_of
from automodel_fn.cast._range import range_loss
from automodel_fn.cast._tensors import scan

# Ties to even: 65520 is halfway to what would come after 65504, 2**-25 halfway to the smallest.
OVER, UNDER = 65520.0, 2.0**-25
LOST = [OVER, -1e30, UNDER, -UNDER, 2.0**-140]
KEPT = [
    65519.0,
    2.0**-25 * 1.001,
    0.0,
    -0.0,
    float("inf"),
    -float("inf"),
    float("nan"),
    -float("nan"),
]


def slow_range_loss(before, after):
    pairs = list(
        zip(before.double().flatten().tolist(), after.double().flatten().tolist(), strict=True)
    )
    infinite = [old for old, new in pairs if abs(new) == float("inf") and abs(old) < float("inf")]
    zero = [old for old, new in pairs if new == 0 and old != 0]
    return len(infinite), len(zero)


def holding(make_holder, *values):
    return make_holder(**{f"t{i}": nn.Parameter(value) for i, value in enumerate(values)})


def cast(model):
    return apply(cast_plan(model, fp16))


def lost(name, num_infinite, num_zero):
    return RangeLoss(name, num_infinite=num_infinite, num_zero=num_zero)


def test_values_that_leave_the_range_are_counted_and_named(make_holder):
    model = holding(
        make_holder, torch.tensor(KEPT), torch.tensor(LOST + KEPT), torch.tensor([1e-9])
    )

    report = apply(cast_plan(model, fp16))

    assert report.range_losses == (lost("t1", 2, 3), lost("t2", 0, 1))
    assert report.notes[-1] == (
        "a cast to float16 made 2 values of 1 tensors infinite and 4 values of 2 tensors zero, "
        "first in 't1'"
    )


def test_nothing_lost_is_nothing_said(make_holder):
    report = cast(holding(make_holder, torch.tensor(KEPT)))

    assert (report.range_losses, report.notes) == ((), ())


@pytest.mark.parametrize("dtype", [bf16, fp32])
def test_other_casts_are_not_counted(make_holder, monkeypatch, dtype):
    monkeypatch.setattr(_range, "range_loss", lambda *_: pytest.fail("counted"))
    model = holding(make_holder, torch.tensor([3.4e38]), torch.tensor([1.0], dtype=fp16))

    assert apply(cast_plan(model, dtype)).range_losses == ()


def test_a_loss_is_logged(make_holder, caplog):
    with caplog.at_level(logging.WARNING, logger="automodel_fn"):
        cast(holding(make_holder, torch.tensor([1e6])))

    assert "made 1 values of 1 tensors infinite, first in 't0'" in caplog.text


@pytest.mark.parametrize("stored", [fp32, bf16])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 17])
@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t,
        lambda t: t.t(),
        lambda t: t[:, ::3],
        lambda t: t[0, 5],
        lambda t: t.view(6, 2, 5, 4).to(memory_format=torch.channels_last),
        lambda t: t[:, :1].expand(12, 9),
        lambda t: t[:0],
    ],
)
def test_the_count_is_that_of_a_slow_count_whatever_the_layout(monkeypatch, stored, chunk, layout):
    monkeypatch.setattr(_range, "_CHUNK_ON_CPU", chunk)
    values = torch.randn(12, 20) * 10.0 ** torch.randint(-12, 12, (12, 20))
    values.view(-1)[:13] = torch.tensor(LOST + KEPT)
    before = layout(values.to(stored))
    after = before.to(fp16)

    assert range_loss(before, after) == slow_range_loss(before, after)


def test_every_bf16_is_counted_rightly():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(bf16)

    assert range_loss(every, every.to(fp16)) == slow_range_loss(every, every.to(fp16))


def test_subnormals_count_also_where_the_cpu_takes_them_for_zero():
    before = torch.tensor([2.0**-140, 1.0])
    after = before.to(fp16)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot take subnormals for zero")
    try:
        assert range_loss(before, after) == (0, 1)
    finally:
        torch.set_flush_denormal(False)


def test_views_of_one_storage_are_counted_each_by_its_name(make_holder):
    flat = torch.tensor([1e6, 1.0, 1e-9, 1e6])
    model = make_holder(a=nn.Parameter(flat[:2]), b=nn.Parameter(flat[1:]))

    assert cast(model).range_losses == (lost("a", 1, 0), lost("b", 1, 1))


def test_gradients_and_optimizer_state_are_counted_too():
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model.weight.grad = torch.tensor([[1e-6, 1e6]])
    optimizer.step()

    losses = apply(cast_plan(model, fp16, optimizers=[optimizer])).range_losses

    assert losses == (
        lost("weight.grad", 1, 0),
        lost("weight (exp_avg)", 1, 0),
        lost("weight (exp_avg_sq)", 1, 1),
    )


def test_a_tie_is_counted_once_and_by_its_first_name(make_holder):
    weight = nn.Parameter(torch.tensor([1e6]))

    model = make_holder(a=weight, b=weight)

    assert cast(model).range_losses == (lost("a", 1, 0),)


def test_a_frozen_cast_and_an_inverse_are_counted(make_holder):
    model = holding(make_holder, torch.tensor([1e6])).requires_grad_(False)
    assert apply(frozen_cast_plan(model, fp16)).range_losses == (lost("t0", 1, 0),)

    model = make_holder(a=nn.Parameter(torch.tensor([1.0], dtype=fp16)))
    plan = cast_plan(model, fp32)
    apply(plan)
    model.a.data.fill_(1e6)
    assert apply(plan.inverse()).range_losses == (lost("a", 1, 0),)


def test_on_meta_nothing_is_counted():
    model = nn.Linear(2, 2, device="meta")

    assert cast(model).range_losses == ()


@pytest.mark.parametrize("keep_originals", [False, True])
def test_a_count_that_fails_leaves_the_model_as_before(
    make_holder, monkeypatch, state_of, keep_originals
):
    model = holding(make_holder, torch.tensor([1e6]), torch.tensor([1e6]))
    plan, before = cast_plan(model, fp16), state_of(model)

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(_range, "range_loss", fails)
    with pytest.raises(MemoryError):
        apply(plan, keep_originals=keep_originals)

    assert state_of(model).differences(before) == []


@pytest.mark.parametrize("keep_originals", [False, True])
def test_a_count_that_fails_midway_leaves_a_whole_model(
    make_holder, monkeypatch, state_of, keep_originals
):
    make = lambda: holding(make_holder, *[torch.tensor([1e6 + i]) for i in range(4)])  # noqa: E731
    model, done, calls = make(), make(), []
    apply(cast_plan(done, fp16))
    plan, before = cast_plan(model, fp16), state_of(model)

    def fails_once(*pair):
        calls.append(pair)
        if len(calls) == 3:
            raise MemoryError
        return range_loss(*pair)

    monkeypatch.setattr(_range, "range_loss", fails_once)
    with pytest.raises(MemoryError):
        apply(plan, keep_originals=keep_originals)

    wanted = before if keep_originals else state_of(done)
    assert state_of(model).differing_values(wanted) == []


def test_a_cast_that_is_interrupted_at_its_count_is_finished_with_what_was_set_aside(
    make_holder, monkeypatch
):
    sizes = []
    empty = torch.empty

    def noted(*args, **kwargs):
        if kwargs.get("dtype") == torch.uint8:
            sizes.extend(args)
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", noted)
    cast(holding(make_holder, torch.ones(1000)))

    assert sizes == [1000 * 2 + 1000 * 8]


def test_a_count_that_never_works_is_a_partial_cast(make_holder, monkeypatch):
    model, calls = holding(make_holder, torch.ones(1), torch.ones(2)), []

    def works_once(*_):
        calls.append(None)
        if len(calls) > 1:
            raise MemoryError
        return 0, 0

    monkeypatch.setattr(_range, "range_loss", works_once)
    with pytest.raises(PartialCastError, match="t1"):
        apply(cast_plan(model, fp16))


def conversions(model):
    found = scan(model).tensors
    batches = batches_of(cast_plan(model, fp16).entries, found, groups=())
    return conversions_of(batches, [item.tensor for item in found])


def test_the_count_of_a_repeated_conversion_is_that_of_one(make_holder, at_operator):
    whole = [1e6, 1e-9, 1.0]

    def interrupt():
        raise KeyboardInterrupt

    for n in range(1, 100):
        model = holding(make_holder, *[torch.tensor(whole) for _ in range(3)])
        count = _range.RangeCount(conversions(model))
        for item in count.exchanges():
            mode = at_operator(n, interrupt)
            try:
                with mode:
                    item.make(0, len(item.names))
            except KeyboardInterrupt:
                item.make(0, len(item.names))
        assert [(loss.num_infinite, loss.num_zero) for loss in count.losses()] == [(1, 1)] * 3
        if mode.seen < n:
            return


def test_a_sharded_tensor_is_counted_by_this_rank_s_shard(make_holder, gloo):
    mesh = init_device_mesh("cpu", (1,))
    whole = torch.tensor([1e6, 1e-9, 1.0])
    model = make_holder(weight=nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])))

    report = apply(cast_plan(model, fp16))

    assert report.range_losses == (RangeLoss("weight", num_infinite=1, num_zero=1),)
