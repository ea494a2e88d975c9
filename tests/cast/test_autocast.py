from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from automodel_fn import apply, bf16, cast_plan, fp16, fp32


class Router(nn.Module):
    """Computes in float32 by itself, as far as autocast lets it."""

    def __init__(self, guarded=False, rounds=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.bias = nn.Parameter(torch.randn(3))
        self.guarded, self.rounds = guarded, rounds

    def forward(self, x):
        guard = torch.autocast(x.device.type, enabled=False)
        with guard if self.guarded else contextlib.nullcontext():
            weight = self.weight.to(bf16) if self.rounds else self.weight
            return (x.to(weight.dtype) @ weight.t() + self.bias).to(x.dtype)


class TwoActivations(nn.Linear):
    def forward(self, x, y):
        return super().forward(x + y)


def lowered(model, dtype=bf16, keep_fp32="*"):
    notes = cast_plan(model, dtype, keep_fp32=keep_fp32).notes
    return [note for note in notes if "torch.autocast" in note]


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.addresses = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == bf16:
            self.addresses.add(args[0].untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


def rounded_for_real(model, x):
    """Names of parameters that autocast rounds in a real forward, and that are not without it."""
    found = []
    for enabled in (True, False):
        watch = Watch()
        with torch.autocast("cpu", dtype=bf16, enabled=enabled, cache_enabled=False), watch:
            model(x)
        found.append(watch.addresses)
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.untyped_storage().data_ptr() in found[0] - found[1]
    }


OWNERS = {
    "Linear": (lambda: nn.Linear(4, 3), {"0.weight", "0.bias"}),
    "Conv1d": (lambda: nn.Conv1d(2, 3, 1), {"0.weight", "0.bias"}),
    "LayerNorm": (lambda: nn.LayerNorm(4), set()),
    "a router that casts": (Router, {"0.weight"}),
    "a router that turns autocast off": (lambda: Router(guarded=True), set()),
    "a router that rounds its weight itself": (lambda: Router(rounds=True), set()),
}


@pytest.mark.parametrize(("make", "names"), OWNERS.values(), ids=OWNERS)
def test_pins_that_autocast_would_round_are_noted(make, names):
    model = nn.Sequential(make())
    assert rounded_for_real(model, torch.randn(1, 2, 4)) == names

    notes = lowered(model)

    assert len(notes) == bool(names)
    if names:
        start = f"{len(names)} fp32 pins, as '0.weight', would be computed in bfloat16 under"
        assert notes[0].startswith(start)


def test_all_of_them_are_in_one_note():
    layers = [nn.Linear(4, 4) for _ in range(3)]
    model = nn.Sequential(*layers, nn.LayerNorm(4), Router(), nn.Linear(4, 4))

    (note,) = lowered(model, keep_fp32=["1", "2", "3", "4"])

    assert note.startswith("5 fp32 pins, as '1.weight',")


def test_a_tied_pin_is_counted_once():
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model["b"].weight = model["a"].weight

    (note,) = lowered(model)

    assert note.startswith("1 fp32 pins, as 'a.weight',")


def test_what_is_not_pinned_is_not_noted():
    assert lowered(nn.Sequential(nn.Linear(4, 4)), keep_fp32=()) == []


def test_it_is_the_dtype_of_the_plan_that_is_named():
    model = nn.Sequential(nn.Linear(4, 4))

    assert "would be computed in float16 under" in lowered(model, fp16)[0]
    assert lowered(model, fp32) == []


def test_a_forward_that_cannot_be_tried_is_not_noted():
    assert lowered(nn.Sequential(TwoActivations(4, 4))) == []


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), Router])
def test_the_note_needs_no_data_and_changes_nothing(make):
    model = nn.Sequential(make())
    with torch.device("meta"):
        empty = nn.Sequential(make())
    before = dict(vars(model[0]))

    assert lowered(model) == lowered(empty) != []
    assert dict(vars(model[0])) == before
    assert not torch.is_autocast_enabled("cpu")


def test_the_note_stands_after_the_cast_as_well():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = lowered(model, keep_fp32="0")

    apply(cast_plan(model, bf16, keep_fp32="0"))

    assert lowered(model, keep_fp32="0") == before
