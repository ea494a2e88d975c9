"""Claims about casts of models that FSDP2 has sharded over two ranks."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import torch
import torch.distributed as dist
from models import (
    Decay,
    Model,
    State,
    assert_same,
    assert_same_bits,
    build,
    inputs,
    loss_of,
    on_all_ranks,
    raised,
    reshard,
    shard_like,
    sharded,
    the_mesh,
    train,
    whole,
    with_boundaries,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from automodel_fn import (
    CastPlan,
    ConfigError,
    OtherRankError,
    StalePlanError,
    apply,
    audit,
    bf16,
    cast_plan,
    fp32,
    frozen_cast_plan,
    restore,
    shard_by_plan,
    snapshot,
    temporary_cast,
)

OPTIMIZERS = (
    lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True),
    lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, fused=True),
    lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
)


def adamw(model):
    return OPTIMIZERS[0](model)


# A sharded model and a plain one, cast alike; each runs its pins in float32.
def cast_both(model, plain, optimizer, plain_optimizer):
    before = {name: p for name, p in model.named_parameters() if hasattr(p, "to_local")}
    for one, its in ((model, optimizer), (plain, plain_optimizer)):
        plan = cast_plan(one, bf16, optimizers=[its])
        apply(plan)
        with_boundaries(one, plan)
    reshard(model)
    assert all(dict(model.named_parameters())[name] is p for name, p in before.items())


def assert_trains_like(model, optimizer, plain, plain_optimizer):
    assert_same(model, optimizer, plain, plain_optimizer)
    assert train(model, optimizer) == train(plain, plain_optimizer)
    assert_same(model, optimizer, plain, plain_optimizer)


def claim_a_model_cast_before_fully_shard_trains_like_an_unsharded_one():
    for make_optimizer in OPTIMIZERS:
        model, plain = build(), build()
        for one in (model, plain):
            plan = cast_plan(one, bf16)
            apply(plan)
            with_boundaries(one, plan)
        sharded(model)
        assert_trains_like(model, make_optimizer(model), plain, make_optimizer(plain))


def claim_a_model_cast_after_fully_shard_trains_like_an_unsharded_one():
    model, plain = sharded(build()), build()
    optimizer, plain_optimizer = adamw(model), adamw(plain)
    cast_both(model, plain, optimizer, plain_optimizer)
    assert_trains_like(model, optimizer, plain, plain_optimizer)


def claim_a_model_cast_while_its_root_is_gathered_trains_like_an_unsharded_one():
    model, plain = sharded(build()), build()
    optimizer, plain_optimizer = adamw(model), adamw(plain)
    with torch.no_grad():
        loss_of(model)
    assert not hasattr(model.head.weight, "to_local")
    cast_both(model, plain, optimizer, plain_optimizer)
    assert_trains_like(model, optimizer, plain, plain_optimizer)


def claim_a_model_cast_between_training_steps_trains_on_like_an_unsharded_one():
    for make_optimizer in OPTIMIZERS:
        model, plain = sharded(build()), build()
        optimizer, plain_optimizer = make_optimizer(model), make_optimizer(plain)
        assert train(model, optimizer) == train(plain, plain_optimizer)
        assert all(p.grad is not None for p in model.parameters())
        cast_both(model, plain, optimizer, plain_optimizer)
        states = {v.dtype for p in model.parameters() for v in optimizer.state[p].values()}
        assert bf16 in states
        assert_trains_like(model, optimizer, plain, plain_optimizer)


def claim_pins_keep_their_bits_whole_and_by_shard_and_are_not_touched():
    plain = {name: p.detach().clone() for name, p in build().named_parameters()}
    model = sharded(build())
    locals_before = {name: p.to_local().data_ptr() for name, p in model.named_parameters()}
    plan = cast_plan(model, bf16)
    report = apply(plan, checksum=True)
    for name, p in model.named_parameters():
        wanted = plain[name]
        if "norm" in name or "decay" in name:
            assert p.to_local().data_ptr() == locals_before[name], name
        else:
            wanted = wanted.to(bf16)
        assert_same_bits(p.full_tensor(), wanted, name)
        assert_same_bits(p.to_local(), shard_like(wanted, p), name)
    assert audit(model, report, bits=True) == ()
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert [finding.what for finding in audit(model, report, bits=True)] == ["bits"]


def claim_the_plan_of_a_sharded_model_is_that_of_the_plain_one():
    model = sharded(build())
    wanted = cast_plan(build(), bf16)
    assert cast_plan(model, bf16) == wanted
    with torch.no_grad():
        loss_of(model)
    state = State(model, adamw(model))
    with torch.no_grad():
        loss_of(model)
    gathered = model.head.weight
    assert cast_plan(model, bf16) == wanted
    assert model.head.weight is gathered
    State(model, adamw(model)).assert_is(state)


def claim_attributes_and_hooks_of_a_sharded_parameter_stay_and_work():
    model, seen = sharded(build()), []
    weight = model.head.weight
    weight.purpose = "head"
    handle = weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.dtype))
    plan = cast_plan(model, bf16)
    apply(plan)
    with_boundaries(model, plan)
    loss_of(model).backward()
    reshard(model)
    assert model.head.weight is weight
    assert weight.purpose == "head"
    assert seen == [bf16]
    handle.remove()
    loss_of(model).backward()
    assert seen == [bf16]


def claim_a_group_of_several_dtypes_is_found_while_planning():
    model = fully_shard(build(), mesh=the_mesh())
    plain_plan = cast_plan(build(), bf16)
    before = State(model, adamw(model))
    holding = ("float32", "bfloat16", "'layers.0.norm.weight'", "shard_by_plan")
    raised(ConfigError, lambda: cast_plan(model, bf16), holding=holding)
    of_json = CastPlan.from_json(plain_plan.to_json())
    raised(ConfigError, lambda: apply(of_json, model), holding=holding)
    State(model, adamw(model)).assert_is(before)
    frozen = build().requires_grad_(False)
    cast_plan(fully_shard(frozen, mesh=the_mesh()), bf16)


def claim_a_pin_that_a_policy_computes_in_bf16_is_noted():
    model = sharded(build(), MixedPrecisionPolicy(param_dtype=bf16))
    (note,) = (note for note in cast_plan(model, bf16).notes if "computed in" in note)
    assert "8 fp32 pins, as 'layers.0.norm.weight'" in note
    assert "computed in bfloat16" in note
    fine = sharded(build(), MixedPrecisionPolicy(param_dtype=fp32))
    assert not [note for note in cast_plan(fine, bf16).notes if "computed in" in note]


def claim_a_frozen_plan_leaves_sharded_parameters_to_fsdp():
    model = sharded(build().requires_grad_(False), MixedPrecisionPolicy(param_dtype=bf16))
    plan = frozen_cast_plan(model, bf16)
    for entry in plan.entries:
        assert entry.action == ("cast" if entry.kind == "buffer" else "skip"), entry
        assert entry.kind == "buffer" or "computes in bfloat16" in entry.reason, entry
    apply(plan)
    assert {p.to_local().dtype for p in model.parameters()} == {fp32}
    assert model.layers[0].scale.dtype == bf16
    tower = frozen_cast_plan(build().requires_grad_(False), bf16)
    assert {entry.action for entry in tower.entries} == {"cast", "keep"}


class FailAt(TorchDispatchMode):
    def __init__(self, n):
        super().__init__()
        self.n, self.seen = n, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        if self.seen == self.n:
            raise MemoryError
        return func(*args, **(kwargs or {}))


def claim_a_cast_that_fails_on_one_rank_leaves_the_model_as_before_on_all():
    model, plain = sharded(build()), build()
    optimizer, plain_optimizer = (torch.optim.SGD(m.parameters(), 0.1) for m in (model, plain))
    assert train(model, optimizer, 1) == train(plain, plain_optimizer, 1)
    num_ops = FailAt(0)
    before = State(model, optimizer)
    with num_ops:
        apply(cast_plan(model, bf16), keep_originals=True).undo()
    State(model, optimizer).assert_is(before)
    outcomes = set()
    for n in range(1, max(on_all_ranks(num_ops.seen)), 5):
        plan = cast_plan(model, bf16)
        report, mode = None, FailAt(n if dist.get_rank() == 1 else 0)
        try:
            with mode:
                report = apply(plan, keep_originals=True)
        except MemoryError:
            assert dist.get_rank() == 1
        except OtherRankError:
            assert dist.get_rank() == 0
        is_cast = report is not None
        assert on_all_ranks(is_cast) == [is_cast] * 2, n
        outcomes.add(is_cast)
        if report is not None:
            report.undo()
        State(model, optimizer).assert_is(before)
        with torch.no_grad():
            assert loss_of(model).item() == loss_of(plain).item(), n
    assert outcomes == {True, False}
    assert train(model, optimizer) == train(plain, plain_optimizer)


def claim_a_plan_that_is_stale_on_one_rank_is_carried_out_on_none():
    model = sharded(build())
    plan = cast_plan(model, bf16)
    if dist.get_rank() == 1:
        model.head.bias.requires_grad_(False)
    before = State(model, adamw(model))
    kind = (OtherRankError, StalePlanError)[dist.get_rank()]
    raised(kind, lambda: apply(plan))
    State(model, adamw(model)).assert_is(before)


def claim_a_cast_can_be_undone_and_inverted():
    model, plain = sharded(build()), build()
    optimizer, plain_optimizer = adamw(model), adamw(plain)
    assert train(model, optimizer) == train(plain, plain_optimizer)
    before = State(model, optimizer)
    plan = cast_plan(model, bf16, optimizers=[optimizer])
    report = apply(plan, keep_originals=True)
    assert model.head.weight.dtype == bf16
    report.undo()
    State(model, optimizer).assert_is(before)
    assert_trains_like(model, optimizer, plain, plain_optimizer)
    for one, its in ((model, optimizer), (plain, plain_optimizer)):
        plan = cast_plan(one, bf16, optimizers=[its])
        apply(plan)
        apply(plan.inverse())
    assert_trains_like(model, optimizer, plain, plain_optimizer)


def claim_an_edit_since_the_cast_on_one_rank_keeps_it_from_being_undone_on_all():
    model = sharded(build())
    report = apply(cast_plan(model, bf16), keep_originals=True)
    if dist.get_rank() == 0:
        model.head.weight.detach().to_local().mul_(2)
    after = State(model, adamw(model))
    raised((StalePlanError, OtherRankError)[dist.get_rank()], report.undo)
    State(model, adamw(model)).assert_is(after)


def claim_a_temporary_cast_of_a_sharded_model_ends_exactly():
    model, plain = sharded(build()), build()
    optimizer, plain_optimizer = adamw(model), adamw(plain)
    for one, its in ((model, optimizer), (plain, plain_optimizer)):
        train(one, its)
        its.zero_grad()
        with temporary_cast(one, bf16), torch.no_grad():
            assert one.layers[0].norm.weight.dtype == bf16
            one(inputs(bf16))
            reshard(one)
            one.head.bias.add_(0.5)
    assert_trains_like(model, optimizer, plain, plain_optimizer)
    for one in (model, plain):
        with temporary_cast(one, fp32, then=bf16):
            pass
    assert_same(model, optimizer, plain, plain_optimizer)


def claim_a_snapshot_of_a_sharded_model_is_restored_exactly():
    model = sharded(build())
    optimizer = adamw(model)
    with torch.no_grad():
        loss_of(model)
    saved, before = snapshot(model), State(model, optimizer)
    held = sum(p.to_local().nbytes for p in model.parameters())
    assert saved.num_bytes == held + sum(b.nbytes for b in model.buffers())
    apply(cast_plan(model, bf16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    restore(saved)
    State(model, optimizer).assert_is(before)
    restore(saved)
    plain = build()
    assert train(model, optimizer) == train(plain, adamw(plain))
    raised(StalePlanError, lambda: restore(saved, build()), holding=("placements",))


def claim_a_cast_in_the_middle_of_a_step_is_refused_and_the_step_can_end():
    model, plain = sharded(build()), build()
    plan = cast_plan(model, bf16)
    loss = loss_of(model)
    raised(ConfigError, lambda: apply(plan), holding=("backward", "layers.0.norm.weight"))
    model.set_requires_gradient_sync(False)
    loss.backward()
    raised(ConfigError, lambda: apply(plan), holding=("not reduced",))
    model.set_requires_gradient_sync(True)
    loss_of(model).backward()
    for _ in range(2):
        loss_of(plain).backward()
    assert_same(model, adamw(model), plain, adamw(plain))
    loss = loss_of(model)
    loss.backward()
    apply(plan)  # the loss is still held


def claim_a_temporary_cast_that_ends_in_the_middle_of_a_step_brings_every_bit_back():
    def a_forward_without_a_backward(model):
        return model(inputs(bf16))

    def a_backward_that_is_not_reduced(model):
        model.set_requires_gradient_sync(False)
        model(inputs(bf16)).sum().backward()
        model.set_requires_gradient_sync(True)

    def end(model, step, held):
        with temporary_cast(model, bf16):
            held.append(step(model))

    for step in (a_forward_without_a_backward, a_backward_that_is_not_reduced):
        model, plain, held = sharded(build()), build(), []
        optimizer = adamw(model)
        before = State(model, optimizer)
        holding = ("layers.0.norm.weight", "They are back as they were", "clear its gradients")
        raised(ConfigError, partial(end, model, step, held), holding=holding)
        held.clear()
        optimizer.zero_grad()
        State(model, optimizer).assert_is(before)
        assert train(model, optimizer) == train(plain, adamw(plain))


def claim_replicas_of_shards_are_cast_alike_but_not_before_they_are_summed_up():
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    model, plain = build(), build()
    for layer in model.layers:
        for unit in (layer.norm, layer.decay, layer):
            fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer, plain_optimizer = adamw(model), adamw(plain)
    assert train(model, optimizer) == train(plain, plain_optimizer)
    model.set_requires_all_reduce(False)
    loss_of(model).backward()
    plan = cast_plan(model, bf16)
    raised(ConfigError, lambda: apply(plan), holding=("not reduced",))
    model.set_requires_all_reduce(True)
    loss_of(model).backward()
    cast_both(model, plain, optimizer, plain_optimizer)
    assert train(model, optimizer) == train(plain, plain_optimizer)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_same_bits(whole(p), q, name)


def claim_a_parameter_with_a_weak_reference_is_refused_by_name():
    model = sharded(build())
    before = State(model, adamw(model))
    watching = weakref.ref(model.head.weight)
    plan = cast_plan(model, bf16)
    raised(ConfigError, lambda: apply(plan), holding=("head.weight", "weak reference"))
    State(model, adamw(model)).assert_is(before)
    del watching
    gc.collect()
    apply(plan)
    assert model.head.weight.to_local().dtype == bf16


class Gate(nn.Module):
    _keep_in_fp32_modules_strict = ("shift",)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5) * 0.3)
        self.shift = nn.Parameter(torch.linspace(0.5, 1.5, 5))
        self.scales = nn.ParameterList([nn.Parameter(torch.linspace(0.9, 1.1, 5))])

    def forward(self, x):
        return ((x @ self.weight).float() * self.shift * self.scales[0]).to(x.dtype)


def gated():
    torch.manual_seed(0)
    model = Model()
    model.layers[1].linear = Gate()
    model.layers[0].decay = nn.Sequential(Decay(), Decay())
    return model


POLICIES = (
    MixedPrecisionPolicy(),
    MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=fp32),
)


def claim_a_model_sharded_by_plan_trains_like_an_unsharded_one():
    keep = "*.scales.*"
    for make_optimizer in OPTIMIZERS:
        for policy in POLICIES:
            model, plain = gated(), gated()
            plan = cast_plan(model, bf16, keep_fp32=keep)
            apply(plan)
            apply(cast_plan(plain, bf16, keep_fp32=keep))
            with_boundaries(plain, plan)
            assert shard_by_plan(model, plan, units="layers.*", mp_policy=policy) is model
            assert not [n for n in cast_plan(model, bf16, keep_fp32=keep).notes if "fp32" in n]
            optimizer, plain_optimizer = make_optimizer(model), make_optimizer(plain)
            assert_same(model, optimizer, plain, plain_optimizer)
            for _ in range(3):
                norms = []
                for one, its in ((model, optimizer), (plain, plain_optimizer)):
                    its.zero_grad()
                    loss_of(one).backward()
                    norm = torch.nn.utils.clip_grad_norm_(one.parameters(), 1e9)
                    norms.append(whole(norm))
                    its.step()
                torch.testing.assert_close(*norms, rtol=2**-8, atol=0)
            assert_same(model, optimizer, plain, plain_optimizer)


def claim_shard_by_plan_makes_the_units_of_the_plan_and_those_asked_for():
    model = gated()
    plan = cast_plan(model, bf16, keep_fp32="*.scales.*")
    before = State(model, adamw(model))
    raised(StalePlanError, lambda: shard_by_plan(model, plan), holding=("apply(plan)",))
    apply(plan)
    raised(ConfigError, lambda: shard_by_plan(model, plan, units="x"), holding=("'x'",))
    assert not any(isinstance(module, FSDPModule) for module in model.modules())
    assert before.objects == State(model, adamw(model)).objects
    shard_by_plan(model, plan, units="layers.*")
    assert [n for n, module in model.named_modules() if isinstance(module, FSDPModule)] == [
        "",
        "layers.0",
        "layers.0.norm",
        "layers.0.decay.0",
        "layers.0.decay.1",
        "layers.1",
        "layers.1.linear",
        "layers.1.norm",
        "layers.1.decay",
    ]
    raised(ConfigError, lambda: shard_by_plan(model, plan), holding=("already",))


def claim_a_plan_of_a_meta_model_holds_for_it_sharded_and_loaded():
    with torch.device("meta"):
        model = Model()
    plan = cast_plan(model, bf16)
    apply(plan)
    shard_by_plan(model, plan, units="layers.*")
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, build().state_dict(), options=options)
    plain = build()
    plain_plan = cast_plan(plain, bf16)
    apply(plain_plan)
    with_boundaries(plain, plain_plan)
    assert audit(model, plan) == ()
    assert_trains_like(model, adamw(model), plain, adamw(plain))


def claim_a_meta_model_that_is_sharded_before_the_cast_holds_as_well():
    with torch.device("meta"):
        model = Model()
    sharded(model)
    plan = cast_plan(model, bf16)
    apply(plan)
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, build().state_dict(), options=options)
    with_boundaries(model, plan)
    plain = build()
    plain_plan = cast_plan(plain, bf16)
    apply(plain_plan)
    with_boundaries(plain, plain_plan)
    assert_trains_like(model, adamw(model), plain, adamw(plain))
