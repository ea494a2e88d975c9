from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from automodel_fn import ConfigError, apply, cast_plan
from automodel_fn.cast._tensors import scan

pytestmark = pytest.mark.usefixtures("_dynamo")


def names_of(model):
    return [item.names for item in scan(model).tensors]


def nested():
    return nn.ModuleDict({"layers": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))})


NAMES = [
    ("layers.0.weight",),
    ("layers.0.bias",),
    ("layers.1.weight",),
    ("layers.1.bias",),
]


class Peft(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model


class Averaged(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.module = model


def test_names_follow_registration_order():
    assert names_of(nested()) == NAMES


def test_a_tensor_at_the_root_has_a_name_without_dots(make_holder):
    assert names_of(make_holder(scale=nn.Parameter(torch.ones(1)))) == [("scale",)]


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, Averaged, Peft])
def test_a_wrapper_around_the_model_is_left_out_of_names(wrap):
    assert names_of(wrap(nested())) == NAMES


def test_wrappers_around_wrappers_are_left_out_of_names():
    assert names_of(nn.DataParallel(torch.compile(Peft(nested())))) == NAMES


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper])
def test_a_wrapper_inside_the_model_is_left_out_of_names(wrap):
    model = nested()
    model["layers"][0] = wrap(model["layers"][0])

    assert names_of(model) == NAMES


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, Averaged, Peft])
def test_raw_names_are_those_of_named_parameters(wrap):
    model = wrap(nested())

    raw = [item.raw_names[0] for item in scan(model).tensors]

    assert raw == [name for name, _ in model.named_parameters()]


def test_a_part_called_module_inside_the_model_keeps_its_name():
    model = nn.ModuleDict({"layer": nn.ModuleDict({"module": nn.Linear(2, 2, bias=False)})})

    assert names_of(model) == [("layer.module.weight",)]


def test_a_root_with_tensors_of_its_own_is_no_wrapper(make_holder):
    model = make_holder(module=nn.Linear(2, 2, bias=False), scale=nn.Parameter(torch.ones(1)))

    assert names_of(model) == [("scale",), ("module.weight",)]


def test_a_model_that_is_called_model_keeps_the_name():
    assert names_of(nn.ModuleDict({"model": nested()}))[0] == ("model.layers.0.weight",)


def test_two_tensors_never_share_a_name():
    inner = nn.Linear(2, 2, bias=False)
    outer = torch.compile(inner)
    outer._parameters["weight"] = nn.Parameter(torch.ones(1))

    names = [name for item in scan(outer).tensors for name in item.names]

    assert sorted(names) == ["_orig_mod.weight", "weight"]


def test_a_tied_tensor_is_found_once_with_all_of_its_names(zoo):
    (tied,) = [item for item in scan(zoo).tensors if item.tensor is zoo.embed.weight]

    assert tied.names == ("embed.weight", "head.weight")


def test_a_shared_buffer_is_found_once_with_all_of_its_names(zoo):
    (shared,) = [item for item in scan(zoo).tensors if item.tensor is zoo.blocks[0].table]

    assert shared.names == ("blocks.0.table", "blocks.1.table")


def test_a_module_registered_twice_gives_its_tensors_both_names():
    layer = nn.Linear(2, 2, bias=False)

    assert names_of(nn.ModuleDict({"a": layer, "b": layer})) == [("a.weight", "b.weight")]


def test_a_module_registered_twice_is_listed_under_both_paths():
    layer = nn.Linear(2, 2, bias=False)

    modules = scan(nn.ModuleDict({"a": layer, "b": layer})).modules

    assert [name for name, _, module in modules if module is layer] == ["a", "b"]


def test_every_tensor_of_the_model_is_found_exactly_once(zoo, tensors_of):
    found = [id(item.tensor) for item in scan(zoo).tensors]

    assert sorted(found) == sorted({id(tensor) for tensor in tensors_of(zoo).values()})


def test_views_of_one_storage_are_tensors_of_their_own(zoo):
    names = names_of(zoo)

    assert ("left",) in names
    assert ("right",) in names


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("special", "parameter"),
        ("blocks.0.table", "buffer"),
        ("blocks.0.inv_freq", "nonpersistent_buffer"),
    ],
)
def test_kind_says_how_a_tensor_is_registered(zoo, name, kind):
    (item,) = [item for item in scan(zoo).tensors if name in item.names]

    assert item.kind == kind


def test_a_tensor_of_several_kinds_counts_as_the_strongest(make_holder):
    weight = nn.Parameter(torch.ones(2))
    model = nn.ModuleDict({"a": nn.Module(), "b": nn.Module(), "c": make_holder(w=weight)})
    model["a"].register_buffer("w", weight, persistent=False)
    model["b"].register_buffer("w", weight)

    (item,) = scan(model).tensors

    assert item.kind == "parameter"


def test_absent_tensors_and_modules_are_passed_over(make_holder):
    model = make_holder(weight=nn.Parameter(torch.ones(1)))
    model.register_parameter("bias", None)
    model.register_buffer("table", None)
    model.register_module("child", None)

    assert names_of(model) == [("weight",)]


@pytest.mark.parametrize(
    ("lazy", "name"),
    [(nn.LazyLinear, "0.weight"), (lambda n: nn.LazyBatchNorm1d(affine=False), "0.running_mean")],
)
def test_a_lazy_model_is_refused_and_the_tensor_is_named(lazy, name):
    with pytest.raises(ConfigError, match=rf"not initialized yet[\s\S]*{name}"):
        scan(nn.Sequential(lazy(2)))


def test_a_lazy_model_is_taken_after_its_first_forward():
    model = nn.Sequential(nn.LazyLinear(2))
    model(torch.ones(1, 3))

    assert names_of(model) == [("0.weight",), ("0.bias",)]


def test_what_is_no_module_is_refused():
    with pytest.raises(ConfigError, match="model=dict"):
        scan({})


def test_a_meta_model_gives_the_same_names():
    with torch.device("meta"):
        twin = nested()

    assert names_of(twin) == names_of(nested())


def test_a_model_in_ddp_has_the_names_and_pins_that_it_has_without(gloo):
    def make():
        model = nn.ModuleDict({"module": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
        model._keep_in_fp32_modules = ["norm"]
        return model

    wrapped = DistributedDataParallel(make())
    plan = cast_plan(wrapped, torch.bfloat16)

    assert plan == cast_plan(make(), torch.bfloat16)
    apply(plan, wrapped.module)
    assert wrapped.module["module"].weight.dtype == torch.bfloat16
    assert wrapped.module["norm"].weight.dtype == torch.float32
