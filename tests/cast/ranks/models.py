"""A model with fp32 pins, uneven and empty shards, and what it takes to train and compare it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from automodel_fn import fp32_boundaries

WORLD = 2


class Decay(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(1.0, 2.0, 5) + 1e-4)
        self.one = nn.Parameter(torch.tensor([1.0001]))  # rank 1 has none of it

    def forward(self, x):
        return (x.float() * self.weight * self.one).to(x.dtype)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.decay = nn.Linear(5, 5), nn.LayerNorm(5), Decay()
        self.register_buffer("scale", torch.full((5,), 1.001))

    def forward(self, x):
        return self.decay(self.linear(self.norm(x))) * self.scale


class Model(nn.Module):
    _keep_in_fp32_modules_strict = ("norm", "decay")

    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(5, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build():
    torch.manual_seed(0)
    return Model()


def the_mesh():
    return init_device_mesh("cpu", (WORLD,))


# As one does without a plan: a unit for each pinned module, all with one policy.
def sharded(model, policy=None):
    policy = policy or MixedPrecisionPolicy()
    mesh = the_mesh()
    for layer in model.layers:
        for unit in (layer.norm, layer.decay, layer):
            fully_shard(unit, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def inputs(dtype):
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).to(dtype)


def loss_of(model):
    return model(inputs(model.head.weight.dtype)).float().pow(2).mean()


# All ranks train on the same batch: the mean of their gradients is each rank's own, exactly.
def train(model, optimizer, num_steps=3, loss_of=loss_of):
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def with_boundaries(model, plan):
    fp32_boundaries(model, plan)
    return model


def bits(tensor):
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(sizes[tensor.dtype.itemsize])


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# What this rank would hold of a plain tensor that is sharded like `like`.
def shard_like(tensor, like):
    rank, world = like.device_mesh.get_local_rank(), like.device_mesh.size()
    (placement,) = like.placements
    if not placement.is_shard():
        return tensor
    chunks = tensor.chunk(world, dim=placement.dim)
    return chunks[rank] if rank < len(chunks) else tensor.narrow(placement.dim, 0, 0)


def assert_same_bits(left, right, name):
    assert left.dtype == right.dtype, (name, left.dtype, right.dtype)
    assert torch.equal(bits(left), bits(right)), name


# Every parameter, gradient, buffer and state, whole and by its local shard.
def assert_same(model, optimizer, plain, plain_optimizer):
    pairs = zip(tensors_of(model, optimizer), tensors_of(plain, plain_optimizer), strict=True)
    for (name, tensor), (other_name, other) in pairs:
        assert name == other_name
        assert_same_bits(whole(tensor), other, name)
        if isinstance(tensor, DTensor):
            assert tensor.to_local().dtype == tensor.dtype, name
            assert_same_bits(tensor.to_local(), shard_like(other, tensor), name)


def reshard(model):
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def tensors_of(model, optimizer):
    reshard(model)
    for name, parameter in model.named_parameters():
        yield name, parameter
        if parameter.grad is not None:
            yield f"{name}.grad", parameter.grad
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{name} ({key})", value
    yield from model.named_buffers()


class State:
    """What a rank holds: objects, dtypes and bits."""

    def __init__(self, model, optimizer):
        found = dict(tensors_of(model, optimizer))
        self.objects = {name: id(tensor) for name, tensor in found.items()}
        self.shards = {name: self._shard(tensor).clone() for name, tensor in found.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in found.items()}

    def _shard(self, tensor):
        return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()

    def assert_is(self, other):
        assert self.objects == other.objects
        assert self.dtypes == other.dtypes
        for name, shard in self.shards.items():
            assert_same_bits(shard, other.shards[name], name)


def raised(kind, function, *, holding=()):
    with pytest.raises(kind) as caught:
        function()
    missing = [text for text in holding if text not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"


def on_all_ranks(value):
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values
