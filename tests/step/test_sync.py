import contextlib

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from automodel_fn import ConfigError, StepContext, accumulate, current_step, gradient_sync

NOT_YET = StepContext(True)
LAST = StepContext(False, optim_step=True)
BATCHES = [torch.tensor([[1.0, float(index)]]) for index in range(5)]


def plain_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


class Counted:
    def __init__(self):
        self.calls = 0
        self.model = DistributedDataParallel(plain_model())
        self.model.register_comm_hook(None, self.hook)

    def hook(self, state, bucket):
        self.calls += 1
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done


@pytest.fixture
def ddp(gloo):
    return Counted()


@pytest.fixture
def sharded(gloo):
    model = plain_model()
    mesh = init_device_mesh("cpu", (1,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def accumulated(batches):
    model = plain_model()
    for batch in batches:
        model(batch).sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def gradients(model):
    return [parameter.grad for parameter in model.parameters()]


def test_ddp_synchronizes_in_the_last_microbatch_of_each_step_only(ddp):
    calls = []
    for step, batch in accumulate(BATCHES, 3):
        with gradient_sync(ddp.model, step):
            ddp.model(batch).sum().backward()
        calls.append(ddp.calls)
    assert calls == [0, 0, 1, 1, 2]
    assert all(map(torch.equal, gradients(ddp.model), accumulated(BATCHES)))


def test_ddp_inside_another_module_is_held_back_too(ddp):
    outer = nn.Sequential(nn.Identity(), ddp.model)
    calls = []
    for step, batch in accumulate(BATCHES[:3], 2):
        with gradient_sync(outer, step):
            outer(batch).sum().backward()
        calls.append(ddp.calls)
    assert calls == [0, 1, 2]


def test_without_gradient_sync_every_backward_synchronizes(ddp):
    for batch in BATCHES[:2]:
        ddp.model(batch).sum().backward()
    assert ddp.calls == 2


def test_ddp_synchronizes_again_after_an_error(ddp):
    with contextlib.suppress(OSError), gradient_sync(ddp.model, NOT_YET):
        ddp.model(BATCHES[0]).sum().backward()
        raise OSError("data")
    assert ddp.calls == 0
    ddp.model(BATCHES[0]).sum().backward()
    assert ddp.calls == 1


def test_sharded_gradients_appear_in_the_last_microbatch_only(sharded):
    present = []
    for step, batch in accumulate(BATCHES[:3], 3):
        with gradient_sync(sharded, step):
            sharded(batch).sum().backward()
        present.append([grad is not None for grad in gradients(sharded)])
    assert present == [[False] * 4, [False] * 4, [True] * 4]
    found = [grad.full_tensor() for grad in gradients(sharded)]
    torch.testing.assert_close(found, accumulated(BATCHES[:3]))


def test_sharded_gradients_synchronize_again_after_an_error(sharded):
    with contextlib.suppress(OSError), gradient_sync(sharded, NOT_YET):
        raise OSError("data")
    sharded(BATCHES[0]).sum().backward()
    assert all(grad is not None for grad in gradients(sharded))


def test_sharded_parts_of_an_unsharded_model_are_held_back(gloo):
    model = plain_model()
    fully_shard(model[1], mesh=init_device_mesh("cpu", (1,)))
    present = []
    for step, batch in accumulate(BATCHES[:2], 2):
        with gradient_sync(model, step):
            model(batch).sum().backward()
        present.append([grad is not None for grad in gradients(model)])
    assert present == [[True, True, False, False], [True] * 4]


@pytest.mark.parametrize("step", [NOT_YET, LAST, StepContext()])
def test_a_plain_model_is_not_changed(step):
    model = plain_model()
    before = set(model.__dict__)
    with gradient_sync(model, step):
        model(BATCHES[1]).sum().backward()
    assert set(model.__dict__) == before
    assert all(map(torch.equal, gradients(model), accumulated(BATCHES[1:2])))


def test_gradient_sync_enters_no_scope():
    with gradient_sync(plain_model(), LAST):
        assert current_step() == StepContext()


@pytest.mark.parametrize("step", [None, True, "last", (True, False)], ids=repr)
def test_what_is_no_step_is_an_error_and_runs_nothing(step):
    ran = []
    wrong = gradient_sync(plain_model(), step)
    with pytest.raises(ConfigError, match="must be a StepContext"), wrong:
        ran.append(step)
    assert ran == []


COUNTED = """
from contextlib import nullcontext
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from automodel_fn import accumulate, gradient_sync

calls = []
# Which of the two FSDP2 calls depends on the version of PyTorch.
names = ("reduce_scatter_single", "reduce_scatter_tensor", "all_reduce")
for name in (name for name in names if hasattr(dist, name)):
    def counted(*args, original=getattr(dist, name), **kwargs):
        calls.append(1)
        return original(*args, **kwargs)
    setattr(dist, name, counted)

def seen(model, is_held, run=None):
    found = []
    for step, batch in accumulate([torch.ones(2, 4)] * 5, 2):
        before = len(calls)
        with gradient_sync(model, step) if is_held else nullcontext():
            run(batch) if run else model(batch).sum().backward()
        found.append(len(calls) - before)
    return found
"""
BLOCKS = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.experts = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.experts(self.dense(x).relu())

experts_mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("ep", "ep_shard"))["ep_shard"]

def blocks():
    made = nn.Sequential(Block(), Block())
    for block in made:
        fully_shard(block.experts, mesh=experts_mesh)
        fully_shard(block, mesh=mesh)
    return made
"""


def test_on_two_ranks_nothing_is_reduced_before_the_optimizer_step(on_two_ranks):
    on_two_ranks(
        COUNTED
        + """
layers = [fully_shard(nn.Linear(4, 4), mesh=mesh) for _ in range(2)]
model = fully_shard(nn.Sequential(*layers), mesh=mesh)
assert seen(model, True) == [0, 2, 0, 2, 2], seen(model, True)
assert seen(model, False) == [2] * 5

def hook(state, bucket):
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

ddp = DistributedDataParallel(nn.Linear(4, 4))
ddp.register_comm_hook(None, hook)
assert seen(ddp, True) == [0, 1, 0, 1, 1]
assert seen(ddp, False) == [1] * 5
"""
    )


def test_experts_on_a_mesh_of_their_own_are_held_back_with_the_rest(on_two_ranks):
    on_two_ranks(
        COUNTED
        + BLOCKS
        + """
model = fully_shard(blocks(), mesh=mesh)
plain = nn.Sequential(Block(), Block())
plain.load_state_dict({name: p.full_tensor() for name, p in model.state_dict().items()})
assert seen(model, True) == [0, 4, 0, 4, 4], seen(model, True)
for _ in range(5):
    plain(torch.ones(2, 4)).sum().backward()
for (name, sharded), whole in zip(model.named_parameters(), plain.parameters(), strict=True):
    torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad, msg=name)
assert seen(model, False) == [4] * 5
"""
    )


def test_a_pipeline_stage_is_held_back_where_only_its_parts_are_sharded(on_two_ranks):
    on_two_ranks(
        COUNTED
        + BLOCKS
        + """
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

group = init_device_mesh("cpu", (1, 2), mesh_dim_names=("pp", "dp")).get_group("pp")

def reduced(model):
    stage = PipelineStage(model, 0, 1, torch.device("cpu"), group=group)
    schedule = ScheduleGPipe(stage, 2, loss_fn=lambda out, target: out.sum())
    return seen(model, True, lambda batch: schedule.step(batch, target=batch))

parts = reduced(blocks())
assert parts == [0, 8, 0, 8, 8], parts
# PyTorch's stage decides for a module that is sharded as a whole: once in each schedule step.
whole = reduced(fully_shard(blocks(), mesh=mesh))
assert whole == [4] * 5, whole
"""
    )
