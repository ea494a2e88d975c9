import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from automodel_fn import apply, bf16, cast_plan, invalidate
from automodel_fn.step._freshness import weight_stamp
from automodel_fn.step._watch import WeightsWatch


def set_data(change):
    def assign(module):
        module.weight.data = change(module.weight.data)

    return assign


def stepped(kind, **options):
    def step(module):
        module(torch.ones(2, 4)).sum().backward()
        kind(module.parameters(), lr=0.5, **options).step()

    return step


def in_place(change):
    def changed(module):
        with torch.no_grad():
            change(module.weight)

    return changed


def replaced(module):
    module.weight = nn.Parameter(module.weight.detach())


def removed(module):
    del module.weight


def parametrized(module):
    parametrize.register_parametrization(module, "weight", nn.Identity())


def swapped(other):
    def swap(module):
        torch.utils.swap_tensors(module.weight, nn.Parameter(other()))

    return swap


CHANGES = {
    "in place": in_place(lambda weight: weight.mul_(2)),
    "a transposed weight": in_place(lambda weight: weight.t_()),
    "an optimizer step": stepped(torch.optim.SGD),
    "a fused optimizer step": stepped(torch.optim.AdamW, fused=True),
    "invalidate": invalidate,
    "a cast": lambda module: apply(cast_plan(module, bf16)),
    "another storage": set_data(lambda data: data.clone()),
    "fewer rows of its storage": set_data(lambda data: data[:2]),
    "other rows of its storage": set_data(lambda data: data[2:]),
    "as many rows further on": set_data(lambda data: data.as_strided((4, 4), (4, 1), 16)),
    "its storage transposed": set_data(lambda data: data.t()),
    "its storage in another shape": set_data(lambda data: data.view(2, 8)),
    "its storage read as another dtype": set_data(lambda data: data.view(torch.complex32)),
    "another parameter with its storage": replaced,
    "a swapped tensor": swapped(lambda: torch.ones(4, 4)),
    "a swapped sparse tensor": swapped(lambda: torch.ones(4, 4).to_sparse()),
}
EMPTYING = {"a removed parameter": removed, "a parametrization": parametrized}


@pytest.fixture
def module():
    torch.manual_seed(0)
    made = nn.Linear(4, 4)
    # Of version 0, as what others put in its place.
    made.weight = nn.Parameter(torch.randn(8, 4)[:4])
    return made


@pytest.fixture
def watch(module):
    made = WeightsWatch([(module._parameters, "bias"), (module._parameters, "weight")])
    made.take()
    return made


changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


@changes
def test_each_change_is_noticed_and_named(module, watch, change):
    assert watch.are_same()
    assert watch.changed() == []
    change(module)
    assert not watch.are_same()
    assert "weight" in watch.changed()


@changes
def test_what_is_taken_again_is_the_same_until_it_changes_again(module, watch, change):
    change(module)
    watch.take()
    assert watch.are_same()
    invalidate(module)
    assert not watch.are_same()


@changes
def test_a_stamp_notices_each_of_them_as_well(module, change):
    before, weight = weight_stamp(module.weight), module.weight
    change(module)
    assert module.weight is not weight or weight_stamp(module.weight) != before


@pytest.mark.parametrize("change", EMPTYING.values(), ids=EMPTYING)
def test_an_empty_place_is_a_change_and_cannot_be_taken(module, watch, change):
    change(module)
    assert not watch.are_same()
    assert watch.changed() == ["weight"]
    with pytest.raises(KeyError, match="weight"):
        watch.take()


def test_nothing_is_same_before_it_is_taken(module):
    watch = WeightsWatch([(module._parameters, "weight")])
    assert not watch.are_same()
    assert watch.changed() == ["weight"]


def test_forwards_backwards_and_what_others_invalidate_are_no_changes(module, watch):
    for _ in range(2):
        module(torch.ones(2, 4)).sum().backward()
        module.zero_grad()
        invalidate(nn.Linear(2, 2))
        assert watch.are_same()


def test_weights_of_a_subclass_are_looked_at_by_their_stamps(watch):
    class Own(nn.Parameter):
        pass

    module = nn.Module()
    module.weight = Own(torch.ones(2, 2))
    watch = WeightsWatch([(module._parameters, "weight")])
    watch.take()
    assert watch.are_same()
    with torch.no_grad():
        module.weight.mul_(2)
    assert not watch.are_same()


def test_weights_made_in_inference_mode_are_looked_at_by_their_stamps():
    with torch.inference_mode():
        module = nn.Linear(2, 2)
    watch = WeightsWatch([(module._parameters, "weight")])
    watch.take()
    assert watch.are_same()
    with torch.inference_mode():
        module.weight = nn.Parameter(torch.ones(2, 2))
    assert not watch.are_same()


def test_neither_the_weight_nor_its_storage_is_kept_alive(module, watch):
    storage = weakref.ref(module.weight.untyped_storage())
    module.weight.data = torch.ones(4, 4)
    gc.collect()
    assert storage() is None
    parameter = weakref.ref(module.weight)
    del module.weight
    gc.collect()
    assert parameter() is None


def test_a_storage_that_comes_in_the_place_of_a_freed_one_is_another(module, watch):
    for _ in range(50):
        module.weight.data = torch.ones(4, 4)
        assert not watch.are_same()
