"""Casts of a model that FSDP2 has sharded over one GPU, with NCCL."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from automodel_fn import apply, bf16, cast_plan, fp32_boundaries, shard_by_plan, temporary_cast

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(self, x):
        return x + self.linear(self.norm(x))


class Model(nn.Module):
    _keep_in_fp32_modules_strict = ("norm",)

    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(32, 8)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture
def mesh():
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cuda", (1,))
    finally:
        dist.destroy_process_group()


def build():
    torch.manual_seed(0)
    return Model().cuda()


def sharded(model, mesh, offload):
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(), "offload_policy": offload}
    for layer in model.layers:
        fully_shard(layer.norm, **options)
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def train(model, optimizer, num_steps=3):
    losses = []
    for _ in range(num_steps):
        inputs = torch.linspace(-1, 1, 32 * 4, device="cuda").view(4, 32)
        optimizer.zero_grad()
        loss = model(inputs.to(model.head.weight.dtype)).float().pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def bits(tensor):
    return whole(tensor.detach()).view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


def assert_same(model, plain):
    for (name, one), (_, other) in zip(
        model.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert one.dtype == other.dtype, name
        assert torch.equal(bits(one), bits(other)), name


def reshard(model):
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_sharded_model_that_is_cast_trains_on_like_an_unsharded_one(mesh, steps_before):
    plain = build()
    model = sharded(build(), mesh, OffloadPolicy())
    pair = [(one, torch.optim.AdamW(one.parameters(), lr=0.002)) for one in (model, plain)]
    before = [train(*one, steps_before) for one in pair]
    assert before[0] == before[1]
    objects = {name: id(p) for name, p in plain.named_parameters()}

    for one, optimizer in pair:
        plan = cast_plan(one, bf16, optimizers=[optimizer])
        apply(plan)
        fp32_boundaries(one, plan)
    reshard(model)

    assert objects == {name: id(p) for name, p in plain.named_parameters()}
    assert_same(model, plain)
    losses = [train(*one) for one in pair]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    reshard(model)
    assert_same(model, plain)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_model_that_is_offloaded_to_the_cpu_is_cast_there_and_trains_on(mesh, steps_before):
    model = sharded(build(), mesh, CPUOffloadPolicy())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)
    before = train(model, optimizer, steps_before)
    reshard(model)
    shards = {name: p.to_local().detach().clone() for name, p in model.named_parameters()}

    plan = cast_plan(model, bf16, optimizers=[optimizer])
    apply(plan)
    fp32_boundaries(model, plan)

    for name, p in model.named_parameters():
        expected = shards[name] if "norm" in name else shards[name].to(bf16)
        local = p.to_local()
        assert local.device.type == "cpu", name
        assert local.dtype == expected.dtype, name
        assert torch.equal(bits(local), bits(expected)), name
    after = train(model, optimizer)
    assert after[-1] < [*before, after[0]][0]
    states = {value.dtype for p in model.parameters() for value in optimizer.state[p].values()}
    assert bf16 in states


def test_a_model_sharded_by_plan_keeps_its_pins_and_trains(mesh):
    plain = build()
    model = build()
    plan = cast_plan(model, bf16)
    apply(plan)
    shard_by_plan(model, plan, mesh=mesh)
    apply(cast_plan(plain, bf16))

    assert_same(model, plain)
    losses = train(model, torch.optim.AdamW(model.parameters(), lr=0.002))
    assert losses[-1] < losses[0]


def test_a_temporary_cast_of_a_sharded_model_brings_every_bit_back(mesh):
    model, plain = sharded(build(), mesh, OffloadPolicy()), build()
    with temporary_cast(model, bf16):
        assert {p.dtype for p in model.parameters()} == {bf16}
    assert_same(model, plain)
