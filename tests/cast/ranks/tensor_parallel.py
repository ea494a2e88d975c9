"""Claims about casts of models that are split over two ranks by tensor parallel plans."""

from __future__ import annotations

import torch
from models import State, bits, reshard, shard_like, the_mesh, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from automodel_fn import apply, bf16, cast_plan, fp32, restore, snapshot, temporary_cast


class Feed(nn.Module):
    _keep_in_fp32_modules_strict = ("norm",)

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.down(self.up(self.norm(x.to(self.norm.weight.dtype)).to(x.dtype)).relu())


def feed():
    torch.manual_seed(0)
    return Feed()


def split(model, mesh=None):
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(),
    }
    return parallelize_module(model, mesh or the_mesh(), plan)


def loss(model):
    x = torch.linspace(-1, 1, 32).reshape(2, 4, 4)
    return model(x.to(model.up.weight.dtype)).float().pow(2).mean()


def trained(model, optimizer):
    return train(model, optimizer, num_steps=2, loss_of=loss)


def claim_shards_and_replicas_are_cast_as_the_whole_tensor_is():
    model, plain = split(feed()), feed()
    placements = {p.placements for p in model.parameters()}
    assert placements == {(Shard(0),), (Shard(1),), (Replicate(),)}
    before = State(model, torch.optim.SGD(model.parameters(), 0.1))
    plan = cast_plan(model, bf16)
    assert plan == cast_plan(plain, bf16)
    apply(plan)
    apply(cast_plan(plain, bf16))
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.dtype == p.to_local().dtype == q.dtype == (fp32 if "norm" in name else bf16)
        assert torch.equal(bits(p.to_local()), bits(shard_like(q.detach(), p))), name
    assert State(model, torch.optim.SGD(model.parameters(), 0.1)).objects == before.objects


def claim_a_split_model_cast_between_steps_trains_like_an_unsplit_one():
    model, plain = split(feed()), feed()
    optimizer, plain_optimizer = (torch.optim.AdamW(m.parameters(), 0.01) for m in (model, plain))
    torch.testing.assert_close(trained(model, optimizer), trained(plain, plain_optimizer))
    seen = []
    model.up.weight.purpose = "up"
    model.up.weight.register_hook(lambda grad: seen.append(grad.dtype))
    for one, its in ((model, optimizer), (plain, plain_optimizer)):
        apply(cast_plan(one, bf16, optimizers=[its]))
    # The halves of a row-wise product are rounded to bf16 before they are added.
    found, wanted = trained(model, optimizer), trained(plain, plain_optimizer)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=0)
    assert model.up.weight.purpose == "up"
    assert seen == [bf16, bf16]
    assert {v.dtype for k, v in optimizer.state[model.up.weight].items() if k != "step"} == {bf16}


def claim_a_split_model_goes_back_exactly():
    model = split(feed())
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    trained(model, optimizer)
    before = State(model, optimizer)
    plan = cast_plan(model, bf16, optimizers=[optimizer])
    apply(plan, keep_originals=True).undo()
    State(model, optimizer).assert_is(before)
    saved = snapshot(model)
    with temporary_cast(model, bf16):
        loss(model)
    State(model, optimizer).assert_is(before)
    optimizer.zero_grad()
    before = State(model, optimizer)
    apply(cast_plan(model, bf16))
    restore(saved)
    State(model, optimizer).assert_is(before)


def claim_views_of_one_shard_stay_views_of_one_storage():
    flat = torch.arange(12.0) + 1e-3
    model = nn.Module()
    mesh = the_mesh()
    for name, part in (("left", flat[:8]), ("right", flat[4:])):
        model.register_parameter(name, nn.Parameter(DTensor.from_local(part, mesh, [Replicate()])))
    plan = cast_plan(model, bf16)
    assert "left, right share one storage and are cast together" in plan.notes
    report = apply(plan, keep_originals=True)
    left, right = model.left.to_local(), model.right.to_local()
    assert left.untyped_storage()._cdata == right.untyped_storage()._cdata
    assert torch.equal(left, flat[:8].to(bf16))
    assert torch.equal(right, flat[4:].to(bf16))
    report.undo()
    assert torch.equal(model.right.to_local(), flat[4:])


def claim_a_sum_that_is_still_to_be_made_is_left_alone():
    model = nn.Module()
    part = DTensor.from_local(torch.ones(3), the_mesh(), [Partial()])
    model.register_buffer("part", part)
    (entry,) = cast_plan(model, bf16).entries
    assert entry.action == "skip"
    assert "DTensor is left as it is" in entry.reason


def claim_a_model_that_is_split_and_sharded_is_cast_in_both():
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "model"))
    model, plain = split(feed(), mesh["model"]), feed()
    fully_shard(model.norm, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    optimizer, plain_optimizer = (torch.optim.AdamW(m.parameters(), 0.01) for m in (model, plain))
    torch.testing.assert_close(trained(model, optimizer), trained(plain, plain_optimizer))
    for one, its in ((model, optimizer), (plain, plain_optimizer)):
        apply(cast_plan(one, bf16, optimizers=[its]))
    reshard(model)
    assert model.up.weight.to_local().dtype == bf16
    assert model.norm.weight.to_local().dtype == fp32
    found, wanted = trained(model, optimizer), trained(plain, plain_optimizer)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=0)
