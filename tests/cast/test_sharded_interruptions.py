from __future__ import annotations

import signal

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

from automodel_fn import apply, bf16, cast_plan, restore, snapshot, temporary_cast
from automodel_fn.cast._sharded import Vote

pytestmark = pytest.mark.usefixtures("gloo")


def out_of_memory():
    raise MemoryError


def interrupt():
    raise KeyboardInterrupt


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


ACTS = pytest.mark.parametrize("act", [out_of_memory, interrupt, press_ctrl_c])
MODES = pytest.mark.parametrize("keep_originals", [False, True])


class Model(nn.Module):
    def __init__(self, special):
        super().__init__()
        self.first, self.norm = nn.Linear(5, 5, bias=False), nn.LayerNorm(5, bias=False)
        self.register_buffer("table", special(3))

    def forward(self, x):
        return self.norm(self.first(x).to(self.norm.weight.dtype))


# A sharded model that has run, with gradients and the state of an optimizer.
@pytest.fixture
def make(special):
    def make():
        torch.manual_seed(0)
        model = Model(special)
        for unit in (model.norm, model):
            fully_shard(unit, mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(torch.ones(2, 5)).sum().backward()
        optimizer.step()
        return model, optimizer

    return make


def tensors_of(model, optimizer):
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    for name, parameter in model.named_parameters():
        yield name, parameter
        if parameter.grad is not None:
            yield f"{name}.grad", parameter.grad
        for key, value in optimizer.state[parameter].items():
            yield f"{name} ({key})", value
    yield from model.named_buffers()


class State:
    def __init__(self, model, optimizer):
        self.objects, self.values = {}, {}
        for name, tensor in tensors_of(model, optimizer):
            shard = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            assert shard.dtype == tensor.dtype, name
            self.objects[name] = id(tensor)
            self.values[name] = shard.detach().clone()

    def is_as(self, other, same_bits):
        return self.values.keys() == other.values.keys() and all(
            same_bits(value, other.values[name]) for name, value in self.values.items()
        )


def planned(model, optimizer):
    return cast_plan(model, bf16, keep_fp32="norm", optimizers=[optimizer])


def applied(keep_originals):
    def prepare(model, optimizer):
        plan = planned(model, optimizer)
        return lambda: apply(plan, keep_originals=keep_originals)

    return prepare


def undone(model, optimizer):
    return apply(planned(model, optimizer), keep_originals=True).undo


def restored(model, optimizer):
    saved = snapshot(model)
    apply(planned(model, optimizer))
    return lambda: restore(saved)


def entered(model, optimizer):
    return temporary_cast(model, bf16).__enter__


def left(model, optimizer):
    context = temporary_cast(model, bf16)
    context.__enter__()
    return lambda: context.__exit__(None, None, None)


# Each place at which an effect can be interrupted: whether the model then is as before, and as
# after; and that it still trains.
@pytest.fixture
def outcomes(make, at_operator, same_bits):
    def outcomes(prepare, act, times=1):
        model, optimizer = make()
        prepare(model, optimizer)()
        after = State(model, optimizer)
        for n in range(1, 1000):
            model, optimizer = make()
            effect = prepare(model, optimizer)
            before = State(model, optimizer)
            mode = at_operator(n, act, times=times)
            try:
                with mode:
                    effect()
            except (MemoryError, KeyboardInterrupt):
                pass
            else:
                assert mode.seen < n, "an interruption was swallowed"
                assert n > 10
                return
            now = State(model, optimizer)
            assert now.objects == before.objects
            x = torch.ones(2, 5, dtype=model.first.weight.dtype)
            model(x).sum().backward()
            optimizer.step()
            yield n, now.is_as(before, same_bits), now.is_as(after, same_bits)

    return outcomes


@ACTS
@MODES
def test_a_cast_of_a_sharded_model_that_is_interrupted_leaves_it_as_before(
    outcomes, act, keep_originals
):
    for n, is_as_before, _ in outcomes(applied(keep_originals), act):
        assert is_as_before, f"at {n}"


@ACTS
@pytest.mark.parametrize("prepare", [undone, restored])
def test_a_way_back_is_gone_wholly_or_not_at_all(outcomes, act, prepare):
    for n, is_as_before, is_as_after in outcomes(prepare, act):
        assert is_as_before or is_as_after, f"at {n}"


@ACTS
def test_a_temporary_cast_that_is_interrupted_on_entry_leaves_the_model_as_before(outcomes, act):
    for n, is_as_before, _ in outcomes(entered, act):
        assert is_as_before, f"at {n}"


def test_a_temporary_cast_ends_that_is_interrupted_once_all_ranks_have_cast(
    make, same_bits, monkeypatch
):
    def press_and_hear(vote, is_well):
        press_ctrl_c()
        vote.is_cast = True
        return is_well

    model, optimizer = make()
    before = State(model, optimizer)
    monkeypatch.setattr(Vote, "hear", press_and_hear)
    with pytest.raises(KeyboardInterrupt):
        temporary_cast(model, bf16).__enter__()
    assert State(model, optimizer).is_as(before, same_bits)


@ACTS
def test_a_temporary_cast_that_is_interrupted_on_exit_still_ends(outcomes, act):
    for n, _, is_as_after in outcomes(left, act):
        assert is_as_after, f"at {n}"


@pytest.mark.parametrize("times", [2, 5])
def test_several_interruptions_are_as_good_as_one(outcomes, times):
    for n, is_as_before, is_as_after in outcomes(applied(False), out_of_memory, times):
        assert is_as_before or is_as_after, f"at {n}"


def test_a_sharded_model_stays_cast_if_an_error_comes_when_all_ranks_are_done(
    make, same_bits, monkeypatch
):
    model, optimizer = make()
    done, its_optimizer = make()
    apply(planned(done, its_optimizer))

    def fails(tensor):
        raise MemoryError

    monkeypatch.setattr("automodel_fn.cast._apply.checksum_of", fails)
    plan = planned(model, optimizer)
    with pytest.raises(MemoryError):
        apply(plan, keep_originals=True, checksum=True)

    assert State(model, optimizer).is_as(State(done, its_optimizer), same_bits)


def test_a_gradient_that_is_a_sum_still_to_be_made_is_noted(gloo, make_holder):
    mesh = init_device_mesh("cpu", (1,))
    whole = nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Replicate()]))
    part = nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Replicate()]))
    whole.grad = distribute_tensor(torch.ones(3), mesh, [Replicate()])
    part.grad = DTensor.from_local(torch.ones(3), mesh, [Partial()])

    model = make_holder(whole=whole, part=part)

    report = apply(cast_plan(model, bf16))

    assert part.grad.dtype == whole.grad.dtype == bf16
    (note,) = [note for note in report.notes if "sums over ranks" in note]
    assert note.startswith("1 gradients")
    assert "'part.grad'" in note
