"""Conversions of many tensors at once: what is in one, their order, and what they are made by."""

from __future__ import annotations

import signal
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import attrs
import pytest
import torch
from torch import nn

from automodel_fn import apply, bf16, cast_plan, fp16, fp32, temporary_cast
from automodel_fn.cast._batches import batches_of, conversions_of
from automodel_fn.cast._conversions import Conversion
from automodel_fn.cast._convert import (
    LARGE,
    converted_at_once,
    converted_together,
    fetch_memory,
)
from automodel_fn.cast._exchange import Exchange, _Run, exchange
from automodel_fn.cast._tensors import scan

CONVERSION = {"aten::_to_copy"}


def conversions(model, dtype=bf16):
    found = scan(model).tensors
    batches = batches_of(cast_plan(model, dtype).entries, found, groups=())
    return conversions_of(batches, [item.tensor for item in found])


class Refusing(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensors_that_may_refuse_are_not_converted_with_others(make_holder):
    model = make_holder(
        large=nn.Parameter(torch.ones(64)),
        a=torch.ones(2),
        refusing=torch.ones(2).as_subclass(Refusing),
        b=torch.ones(2),
    )

    made = conversions(model)

    finishes = {name: c.exchange().can_finish for c in made for name in c.names}
    assert finishes == {"large": True, "a": True, "refusing": False, "b": True}
    assert ("a", "b") in [conversion.names for conversion in made]


def test_entries_of_another_order_are_carried_out_by_their_names(make_holder, same_bits):
    values = {name: torch.full((3,), 1.001) for name in ("a", "b", "c")}
    model = make_holder(**{name: nn.Parameter(value.clone()) for name, value in values.items()})
    plan = cast_plan(model, bf16, keep_fp32="a")

    apply(attrs.evolve(plan, entries=plan.entries[::-1]), model)

    assert same_bits(model.a, values["a"])
    assert same_bits(model.b, values["b"].to(bf16))
    assert same_bits(model.c, values["c"].to(bf16))


@pytest.mark.parametrize("widening", ["a", "z"])
def test_undo_gives_each_its_own_original_where_some_become_wider(
    make_holder, special, state_of, widening
):
    names = ("a", "m", "z")
    stored = {name: bf16 if name == widening else fp32 for name in names}
    model = make_holder(**{n: nn.Parameter(special(4).to(stored[n])) for n in names})
    before = state_of(model)

    report = apply(cast_plan(model, bf16, keep_fp32=widening), keep_originals=True)
    assert getattr(model, widening).dtype == fp32
    report.undo()

    assert state_of(model).differences(before) == []


def test_what_cannot_be_finished_at_once_is_finished_in_parts():
    tensors = tuple(torch.full((2,), float(i)) for i in range(4))
    calls = []

    def make(start, stop):
        calls.append((start, stop))
        if stop - start > 1:
            raise MemoryError
        return tuple(tensor.to(bf16) for tensor in tensors[start:stop])

    whole = Exchange(
        ("t0", "t1", "t2", "t3"),
        tensors=tensors,
        make=make,
        ends=(1, 4),
        num_bytes=4,
        first_bytes=4,
        can_finish=True,
        is_divisible=True,
    )

    with pytest.raises(MemoryError):
        exchange([whole])

    assert calls == [(0, 1), (1, 4), (1, 2), (2, 3), (3, 4)]
    assert [tensor.dtype for tensor in tensors] == [bf16] * 4
    assert [tensor.tolist() for tensor in tensors] == [[float(i)] * 2 for i in range(4)]


def test_new_data_is_made_with_gradients_off_and_they_are_on_again_also_after_an_error():
    seen = []

    def make(error=None):
        seen.append(torch.is_grad_enabled())
        if error is not None:
            raise error
        return (torch.ones(1),)

    for error in (None, MemoryError()):
        item = Exchange.at_once(("t",), (torch.zeros(1),), partial(make, error))
        with pytest.raises(MemoryError) if error else nullcontext():
            exchange([item])
        assert torch.is_grad_enabled()
    assert seen == [False, False]


def test_a_temporary_cast_that_is_interrupted_before_it_begins_converts_nothing(
    make_holder, at_operator
):
    def press_ctrl_c():
        signal.raise_signal(signal.SIGINT)

    tried = torch.ones(3).as_subclass(Refusing)
    model = make_holder(a=tried, b=nn.Parameter(torch.ones(4)))
    mode = at_operator(1, press_ctrl_c, names=CONVERSION)

    with mode, pytest.raises(KeyboardInterrupt):
        temporary_cast(model, bf16).__enter__()

    assert mode.seen == 1  # one element, on trial


# The step of a dimension with one element says nothing of the layout.
def steps(tensor):
    return [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


@pytest.mark.parametrize("dtype", [bf16, fp16])
def test_many_at_once_have_the_bits_strides_and_storages_of_each_alone(special, same_bits, dtype):
    base = special(4, 6)
    tensors = (
        *(special(2, 5), special(2, 5), special(3)),
        *(special(2, 5).t(), special(1, 3, 2, 2).to(memory_format=torch.channels_last)),
        *(base[:, ::2], base[0].expand(3, 6), special(1, 4).as_strided((1, 4), (9, 1))),
    )

    made = converted_together(tensors, dtype)

    for tensor, new in zip(tensors, made, strict=True):
        alone = tensor.to(dtype)
        assert same_bits(new, alone)
        assert steps(new) == steps(alone)
    assert len({new.untyped_storage().data_ptr() for new in made}) == len(tensors)


def reserved(plan, monkeypatch):
    """How many bytes `apply` sets aside."""
    sizes, empty = [], torch.empty

    def noted(*args, **kwargs):
        if kwargs.get("dtype") == torch.uint8:
            sizes.extend(args)
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", noted)
    apply(plan)
    return sizes


def test_memory_for_all_of_a_shared_storage_is_set_aside(make_holder, monkeypatch):
    flat = torch.ones(1000)
    model = make_holder(small=nn.Parameter(flat[:1]), large=nn.Parameter(flat[500:]))

    assert reserved(cast_plan(model, bf16), monkeypatch) == [1000 * bf16.itemsize]


def test_memory_for_a_view_with_gaps_that_is_cast_beside_its_storage_is_set_aside(
    make_holder, monkeypatch
):
    flat = torch.ones(10, 100)
    model = make_holder(all=nn.Parameter(flat), some=nn.Parameter(flat[:, ::2]))

    assert reserved(cast_plan(model, bf16), monkeypatch) == [(1000 + 500) * bf16.itemsize]


def test_a_gpu_is_asked_once_for_the_reserve_and_the_first_step(monkeypatch):
    asked, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, **kwargs: asked.append(size) or empty(0))
    tensor = SimpleNamespace(device=torch.device("cuda"))
    one, other = (
        SimpleNamespace(
            tensors=(tensor,), ends=(1,), num_bytes=size, first_bytes=first, can_finish=True
        )
        for size, first in ((4, 7), (6, 100))
    )

    _Run([one, other], False, False).reserve()

    assert asked == [6 + 7, 6]


def test_the_first_step_of_views_takes_their_storage_once():
    flat = torch.ones(10)
    views = Conversion.of_one_storage(("a", "b", "c"), (flat, flat[:5], flat[:]), bf16)

    assert views.exchange().first_bytes == views.num_bytes == 20


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt, RuntimeError])
def test_only_a_lack_of_memory_in_one_piece_is_no_error(error, monkeypatch):
    asked = []

    def refused(size, **kwargs):
        asked.append((size, kwargs))
        raise error

    monkeypatch.setattr(torch, "empty", refused)

    with nullcontext() if error is torch.OutOfMemoryError else pytest.raises(error):
        fetch_memory(8, torch.device("cuda"))

    assert asked == [(8, {"dtype": torch.uint8, "device": torch.device("cuda")})]


class Streams:
    """Streams that note who waits for whom, and what is launched on which."""

    def __init__(self, monkeypatch):
        self.seen, self.now = [], "current"
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self._stream("current"))
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: self._stream("other"))
        monkeypatch.setattr(torch.cuda, "stream", self._entered)

    def _stream(self, name):
        def waits(other):
            self.seen.append(f"{name} waits for {other.name}")

        return SimpleNamespace(name=name, wait_stream=waits)

    @contextmanager
    def _entered(self, stream):
        before, self.now = self.now, stream.name
        try:
            yield
        finally:
            self.now = before


@pytest.mark.parametrize("number", [2, 3, 5])
def test_two_streams_wait_for_one_another_before_and_after_all_casts(
    monkeypatch, at_operator, same_bits, special, number
):
    streams, tensors = Streams(monkeypatch), tuple(special(2, n + 1) for n in range(number))
    operators = {"aten::_to_copy", "aten::copy_"}
    mode = at_operator(1, lambda: streams.seen.append(streams.now), names=operators, times=99)

    with mode:
        made = converted_at_once(tensors, bf16)

    assert streams.seen == [
        "other waits for current",
        *["other"] * (number // 2),
        *["current"] * ((number + 1) // 2),
        "current waits for other",
    ]
    assert all(same_bits(new, tensor.to(bf16)) for new, tensor in zip(made, tensors, strict=True))


@pytest.mark.parametrize("operator", ["aten::copy_", "aten::_to_copy"])
def test_the_streams_meet_also_after_an_error(monkeypatch, at_operator, operator):
    def fails():
        raise MemoryError

    streams, tensors = Streams(monkeypatch), tuple(torch.ones(2) for _ in range(4))
    with at_operator(1, fails, names={operator}), pytest.raises(MemoryError):
        converted_at_once(tensors, bf16)

    assert streams.seen[-1] == "current waits for other"


def test_small_and_large_tensors_on_one_device_are_cast_apart(make_holder):
    small, large = torch.ones(3), torch.ones(LARGE)
    model = make_holder(a=small.clone(), b=large, c=small.clone())

    assert [c.names for c in conversions(model)] == [("a", "c"), ("b",)]
