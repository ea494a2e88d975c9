from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from automodel_fn import (
    BackendUnavailableError,
    ConfigError,
    apply,
    bf16,
    cast_plan,
    fp32,
    frozen_cast_plan,
    restore,
    shard_by_plan,
    snapshot,
    temporary_cast,
)

pytestmark = pytest.mark.usefixtures("gloo")


@pytest.fixture
def mesh(gloo):
    return init_device_mesh("cpu", (1,))


def sharded(mesh):
    torch.manual_seed(0)
    return fully_shard(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), mesh=mesh)


@pytest.fixture
def records(mesh):
    model = sharded(mesh)
    state = model._get_fsdp_state()
    (group,) = state._fsdp_param_groups
    return model, state, group, group.fsdp_params[0]


@pytest.mark.parametrize(
    ("index", "name"),
    [
        (2, "_init_mp_dtypes"),
        (2, "mp_policy"),
        (3, "reset_sharded_param"),
        (3, "all_gather_outputs"),
    ],
)
def test_records_that_are_not_known_are_refused_with_their_names(records, index, name, monkeypatch):
    model, record = records[0], records[index]
    owner = record if name in vars(record) else type(record)
    monkeypatch.delattr(owner, name)
    with pytest.raises(BackendUnavailableError, match=rf"torch=2.*{name}.*Cast before fully_shard"):
        cast_plan(model, bf16)


def test_the_record_of_a_torch_that_has_one_group_a_module_is_known(records, monkeypatch):
    model, state, group, _ = records
    model.requires_grad_(False)
    monkeypatch.delattr(state, "_fsdp_param_groups")
    monkeypatch.setattr(type(state), "_fsdp_param_group", group)
    reasons = [entry.reason for entry in frozen_cast_plan(model, bf16).entries]
    assert all("left to FSDP2" in reason for reason in reasons)


def test_a_restore_that_would_mix_the_dtypes_of_a_group_is_rolled_back(mesh):
    model = sharded(mesh)
    saved = snapshot(model, "0")
    apply(cast_plan(model, bf16))
    model(torch.ones(1, 4, dtype=bf16))
    with pytest.raises(ConfigError, match="several dtypes"):
        restore(saved)
    model.reshard()
    assert {p.to_local().dtype for p in model.parameters()} == {bf16}
    model(torch.ones(1, 4, dtype=bf16)).sum().backward()


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"),
    reason="before PyTorch 2.13 gradients have no dtype of their own",
)
def test_a_gradient_is_cast_where_its_parameter_is_not(mesh):
    model = sharded(mesh)
    weight = model[0].weight
    weight.grad_dtype = None
    grad = weight.detach().bfloat16()
    weight.grad = grad
    with temporary_cast(model, fp32):
        assert weight.grad.dtype == bf16
    assert weight.grad is grad
    assert grad.dtype == grad.to_local().dtype == fp32


class Beside(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.shift = nn.Parameter(torch.full((4,), 1.001))

    def forward(self, x):
        return ((x @ self.weight).float() * self.shift).to(x.dtype)


@pytest.fixture
def beside():
    model = nn.Sequential(Beside(), nn.Linear(4, 2))
    plan = cast_plan(model, bf16, keep_fp32="*.shift")
    apply(plan)
    return model, plan


def test_a_mixed_module_is_refused_where_torch_has_no_way_for_it(beside, mesh, monkeypatch):
    model, plan = beside
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp._fully_shard._fsdp_common", None)
    with pytest.raises(BackendUnavailableError, match="a module of their own"):
        shard_by_plan(model, plan, mesh)
    assert not any(isinstance(module, FSDPModule) for module in model.modules())


def test_a_mixed_module_is_refused_on_a_mesh_of_two_dimensions(beside):
    model, plan = beside
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicas", "shards"))
    with pytest.raises(ConfigError, match="two groups"):
        shard_by_plan(model, plan, mesh)
    assert not any(isinstance(module, FSDPModule) for module in model.modules())


def test_a_pin_in_a_mixed_module_is_computed_in_float32(beside, mesh):
    model, plan = beside
    seen = []
    model[0].register_forward_hook(lambda module, *_: seen.append(module.shift.dtype))
    shard_by_plan(model, plan, mesh)
    assert model(torch.ones(1, 4, dtype=bf16)).dtype == bf16
    assert seen == [torch.float32]


@pytest.mark.parametrize("holder", [nn.ModuleDict, nn.ModuleList])
def test_the_modules_in_a_pinned_container_are_units(mesh, holder):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            norms = {"a": nn.LayerNorm(4), "b": nn.LayerNorm(4)}
            self.norms = holder(norms if holder is nn.ModuleDict else norms.values())
            self.last = nn.Linear(4, 2)

        def forward(self, x):
            for norm in self.norms.values() if holder is nn.ModuleDict else self.norms:
                x = norm(x)
            return self.last(x)

    model = Model()
    plan = cast_plan(model, bf16, keep_fp32="norms")
    apply(plan)
    shard_by_plan(model, plan, mesh)
    found = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    keys = ("a", "b") if holder is nn.ModuleDict else ("0", "1")
    assert found == ["", *(f"norms.{key}" for key in keys)]
    model(torch.ones(1, 4, dtype=bf16)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_pins_right_in_a_container_belong_to_the_module_that_holds_it(mesh):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scales = nn.ParameterList([nn.Parameter(torch.ones(4))])
            self.last = nn.Linear(4, 2)

        def forward(self, x):
            return self.last((x.float() * self.scales[0]).to(x.dtype))

    model = Model()
    plan = cast_plan(model, bf16, keep_fp32="scales")
    apply(plan)
    shard_by_plan(model, plan, mesh)
    model(torch.ones(1, 4, dtype=bf16)).sum().backward()
    assert model.scales[0].grad.dtype == torch.float32
    assert model.last.weight.grad.dtype == bf16


def test_a_tied_pin_is_one_unit_of_both_modules(mesh):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.middle = nn.Embedding(5, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.middle(self.embed(x).bfloat16()))

    model = Model()
    plan = cast_plan(model, bf16, keep_fp32="embed")
    apply(plan)
    shard_by_plan(model, plan, mesh)
    model(torch.tensor([[1, 2]])).sum().backward()
    model.reshard()
    for module in (model.embed, model.head):
        module.reshard()
    assert model.embed.weight is model.head.weight
    assert model.head.weight.grad.dtype == torch.float32
