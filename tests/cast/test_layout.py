"""A plan knows its own model again without a comparison name by name, and knows nothing else."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import attrs
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

from automodel_fn import CastPlan, StalePlanError, apply, bf16, cast_plan
from automodel_fn.cast import _apply
from automodel_fn.cast._bits import same_bits
from automodel_fn.cast._layout import Layout
from automodel_fn.cast._tensors import scan
from automodel_fn.testing import models
from automodel_fn.testing._twin import twin_of


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("fleeting", torch.ones(3), persistent=False)
        self.empty = None


def made():
    return nn.Sequential(Block(), Block(), nn.Linear(4, 4, bias=False))


def known(plan, model):
    return plan.layout.tensors_of(model, plan.entries)


def by_names(plan):
    return attrs.evolve(plan, layout=Layout())


class Sub(torch.Tensor):
    pass


def retype(model):
    model[0].proj.weight.data = model[0].proj.weight.data.half()


def reshape(model):
    model[0].proj.weight.data = torch.ones(2, 8)


def freeze(model):
    model[1].proj.bias.requires_grad_(False)


def rename(model):
    block = model[0]
    block.other = block.proj
    del block.proj


def reorder(model):
    weight = model[0].proj._parameters.pop("weight")
    model[0].proj._parameters["weight"] = weight


def make_a_buffer_of_a_parameter(model):
    weight = model[2]._parameters.pop("weight")
    model[2]._buffers["weight"] = weight


def make_a_buffer_persistent(model):
    model[0]._non_persistent_buffers_set.clear()


def move_a_module(model):
    model[0].norm.proj = model[0].proj
    del model[0].proj


def move_a_parameter(model):
    model[0]._parameters["bias"] = model[0].proj._parameters.pop("bias")


def fill_an_empty_place(model):
    model[0].empty = nn.Parameter(torch.ones(2))


def empty_a_place(model):
    model[1].proj.bias = None


def tie(model):
    model[1].proj.weight = model[0].proj.weight


def share_a_storage(model):
    model[1].proj.weight.data = model[0].proj.weight.data.view(4, 4)


def add(model):
    model.append(nn.Linear(2, 2))


def remove(model):
    del model[1]


def wrap(model):
    model[0] = nn.Sequential(model[0])


def replace_by_another_class(model):
    model[2] = nn.Bilinear(4, 4, 4)


def replace_a_module_by_its_like(model):
    model[2] = nn.Linear(4, 4, bias=False)


def change_a_class(model):
    class Other(nn.Linear):
        pass

    model[2].__class__ = Other


def put_a_subclass_in(model):
    model[2].weight = nn.Parameter(torch.ones(4, 4).as_subclass(Sub))


def shard(model):
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def distribute(model):
    mesh = init_device_mesh("cpu", (1,))
    model[2].weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Replicate()]))


def replace_a_tensor(model):
    model[2].weight = nn.Parameter(torch.randn(4, 4))


def move(model):
    model.to("meta")


CHANGES = (
    *(retype, reshape, freeze, rename, reorder, make_a_buffer_of_a_parameter),
    *(make_a_buffer_persistent, move_a_module, move_a_parameter, fill_an_empty_place),
    *(empty_a_place, tie, share_a_storage, add, remove, wrap, replace_by_another_class),
    *(replace_a_module_by_its_like, change_a_class, put_a_subclass_in, shard, distribute, move),
    *(replace_a_tensor,),
)
# The plan holds for them, but only the comparison by names can know.
STILL_FITTING = (
    *(replace_a_module_by_its_like, change_a_class, put_a_subclass_in, shard, distribute, move),
    *(share_a_storage, reorder, replace_a_tensor),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_is_not_known_and_is_compared_by_its_names(change, gloo, state_of):
    model = made()
    plan = cast_plan(model, bf16)
    assert known(plan, model) is not None

    change(model)

    assert known(plan, model) is None
    if change in STILL_FITTING:
        apply(plan)
        assert model[2].weight.dtype == bf16
        assert model[0].proj.bias.dtype == bf16
        return
    before = state_of(model)
    with pytest.raises(StalePlanError) as found:
        apply(plan)
    with pytest.raises(StalePlanError) as expected:
        apply(by_names(plan), model)
    assert str(found.value) == str(expected.value)
    assert state_of(model).differences(before) == []


def test_a_known_model_is_not_walked_by_its_names(monkeypatch):
    model = made()
    plan = cast_plan(model, bf16)

    def fails(_):
        raise AssertionError

    monkeypatch.setattr(_apply, "scan", fails)
    apply(plan)

    assert model[2].weight.dtype == bf16


@given(model=models())
def test_what_is_known_of_any_model_is_what_a_walk_finds(model):
    plan = cast_plan(model, bf16)
    tensors = known(plan, model)
    if tensors is not None:
        assert [id(t) for t in tensors] == [id(item.tensor) for item in scan(model).tensors]


@given(model=models())
def test_a_plan_that_knows_its_model_does_to_it_what_one_that_does_not_would(model):
    twin = twin_of(model)
    plan = cast_plan(model, bf16)
    ours, theirs = apply(plan), apply(by_names(cast_plan(twin, bf16)), twin)

    assert ours == theirs
    left, right = scan(model).tensors, scan(twin).tensors
    for one, other in zip(left, right, strict=True):
        assert same_bits(one.tensor, other.tensor)


def test_a_tied_model_is_known_and_stays_tied():
    model = made()
    model[1].proj.weight = model[0].proj.weight
    plan = cast_plan(model, bf16)
    assert known(plan, model) is not None

    apply(plan)

    assert model[1].proj.weight is model[0].proj.weight
    assert model[1].proj.weight.dtype == bf16


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda p: pickle.loads(pickle.dumps(p)),
        lambda p: CastPlan.from_json(p.to_json()),
    ],
    ids=["deepcopy", "pickle", "json"],
)
def test_a_copy_of_a_plan_knows_no_model(copied):
    model = made()
    plan = copied(cast_plan(model, bf16))

    assert known(plan, model) is None
    apply(plan, model)
    assert model[2].weight.dtype == bf16


def test_a_plan_with_other_entries_or_for_another_model_is_compared_by_names():
    model, other = made(), made()
    plan = cast_plan(model, bf16)

    assert known(plan, other) is None
    assert known(plan.inverse(), model) is None
    assert known(attrs.evolve(plan, entries=(*plan.entries,)), model) is None


@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_with_shards_or_shared_storages_is_never_known(sharded, gloo):
    model = made()
    (shard if sharded else share_a_storage)(model)

    assert known(cast_plan(model, bf16), model) is None


def test_a_plan_keeps_neither_modules_nor_tensors():
    model = made()
    plan = cast_plan(model, bf16)
    references = [weakref.ref(item) for item in (model, model[0], model[0].proj.weight)]
    del model
    gc.collect()

    assert plan.entries
    assert [reference() for reference in references] == [None] * 3


def test_a_model_with_a_tensor_of_another_class_is_not_known():
    class Own(nn.Parameter):
        pass

    model = made()
    plan = cast_plan(model, bf16)
    assert known(plan, model) is not None

    model[0].proj.weight.__class__ = Own

    assert known(plan, model) is None
