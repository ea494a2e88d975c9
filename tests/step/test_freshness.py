import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from automodel_fn import apply, bf16, cast_plan, invalidate
from automodel_fn.step._freshness import weight_stamp

OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "fused": True}),
    (torch.optim.SGD, {"lr": 0.1, "foreach": True}),
    (torch.optim.AdamW, {"lr": 0.1}),
    (torch.optim.AdamW, {"lr": 0.1, "fused": True}),
    (torch.optim.AdamW, {"lr": 0.1, "foreach": True}),
]


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


@pytest.fixture
def weight(model):
    return model[0].weight


def run(model):
    model(torch.tensor([[1.0, 2.0], [3.0, 5.0]])).square().sum().backward()


def test_a_stamp_is_equal_while_the_weight_is_the_same(model, weight):
    before = weight_stamp(weight)
    run(model)
    run(model)
    model.zero_grad()
    model.train(False)
    assert weight_stamp(weight) == before
    assert hash(weight_stamp(weight)) == hash(before)


def test_equal_weights_have_different_stamps(model):
    twin = copy.deepcopy(model)
    assert weight_stamp(model[0].weight) != weight_stamp(twin[0].weight)


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_an_optimizer_step_is_noticed(model, weight, kind, options):
    optimizer = kind(model.parameters(), **options)
    stamps = [weight_stamp(weight)]
    for _ in range(3):
        run(model)
        assert weight_stamp(weight) == stamps[-1]
        optimizer.step()
        stamps.append(weight_stamp(weight))
    assert len(set(stamps)) == 4


def test_an_optimizer_made_before_the_first_stamp_is_noticed(model, weight):
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    run(model)
    before = weight_stamp(weight)
    optimizer.step()
    assert weight_stamp(weight) != before


CHANGES = {
    "in_place": lambda model: model[0].weight.detach().mul_(2),
    "through_a_view": lambda model: model[0].weight.detach().view(-1)[0].zero_(),
    "copy": lambda model: model[0].weight.detach().copy_(torch.ones(2, 2)),
    "data": lambda model: setattr(model[0].weight, "data", torch.ones(2, 2)),
    "load": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
    "cast": lambda model: apply(cast_plan(model, bf16)),
    "to": lambda model: model.to(bf16),
    "invalidate_model": invalidate,
    "invalidate_tensor": lambda model: invalidate(model[0].weight),
    "invalidate_tensors": lambda model: invalidate(model.parameters()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(model, weight, change):
    before = weight_stamp(weight)
    CHANGES[change](model)
    assert model[0].weight is weight
    assert weight_stamp(weight) != before
    assert weight_stamp(weight) == weight_stamp(weight)


def test_a_state_dict_that_is_assigned_is_noticed(model):
    before = weight_stamp(model[0].weight)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert weight_stamp(model[0].weight) != before


def test_data_elsewhere_in_the_same_storage_is_noticed():
    flat = torch.arange(4.0)
    weight = nn.Parameter(flat[:2])
    before = weight_stamp(weight)
    weight.data = flat[2:]
    assert weight.tolist() == [2, 3]
    assert weight_stamp(weight) != before


def test_data_in_another_order_is_noticed():
    weight = nn.Parameter(torch.arange(4.0).view(2, 2))
    before = weight_stamp(weight)
    weight.data = weight.data.t()
    assert weight_stamp(weight) != before


def test_undoing_a_cast_is_a_change_too(model, weight):
    report = apply(cast_plan(model, bf16), keep_originals=True)
    cast = weight_stamp(weight)
    report.undo()
    assert weight.dtype == torch.float32
    assert weight_stamp(weight) != cast


def test_a_storage_address_that_recurs_is_still_noticed():
    weight = nn.Parameter(torch.zeros(4))
    stamps, addresses = set(), set()
    for _ in range(300):
        stamps.add(weight_stamp(weight))
        addresses.add(weight.data_ptr())
        weight.data = torch.zeros(4)
    assert len(stamps) == 300
    assert len(addresses) < 300


def test_a_stamp_keeps_no_memory():
    weight = nn.Parameter(torch.zeros(4))
    stamp = weight_stamp(weight)
    assert not stamp._storage.expired()
    del weight
    assert stamp._storage.expired()


def test_invalidate_reaches_parameters_and_buffers_and_nothing_else(model):
    other = nn.Linear(2, 2)
    tensors = [*model.parameters(), *model.buffers()]
    before, before_other = [weight_stamp(t) for t in tensors], weight_stamp(other.weight)
    invalidate(model)
    assert all(weight_stamp(t) != b for t, b in zip(tensors, before, strict=True))
    assert weight_stamp(other.weight) == before_other


def test_an_invalidated_model_can_still_be_converted_by_swapping(model):
    invalidate(model)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(bf16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model[0].weight.dtype == torch.bfloat16


def inferred():
    with torch.inference_mode():
        return torch.ones(2)


UNUSUAL = {
    "meta": lambda: nn.Parameter(torch.empty(2, 2, device="meta")),
    "inference": inferred,
    "sparse": lambda: torch.eye(2).to_sparse(),
    "uninitialized": lambda: nn.LazyLinear(2).weight,
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_unusual_tensor_has_a_stamp_and_can_be_invalidated(kind):
    weight = UNUSUAL[kind]()
    before = weight_stamp(weight)
    assert weight_stamp(weight) == before
    invalidate(weight)
    assert weight_stamp(weight) != before


class Watched(nn.Linear):
    def forward(self, x):
        self.seen = weight_stamp(self.weight), self.weight.detach().clone()
        return super().forward(x)


@pytest.fixture
def sharded(gloo):
    model = Watched(2, 2)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


def seen_in_forward(model):
    model(torch.ones(1, 2)).sum().backward()
    return model.seen


def doubled(state):
    return {name: tensor * 2 for name, tensor in state.items()}


SHARDED_CHANGES = {
    "in_place": lambda model: model.weight.detach().mul_(2),
    "load": lambda model: model.load_state_dict(doubled(model.state_dict())),
    "optimizer": lambda model: torch.optim.AdamW(model.parameters(), fused=True).step(),
}


def test_invalidating_a_sharded_model_is_noticed_in_the_forward(sharded):
    seen_in_forward(sharded)
    stamp, _ = seen_in_forward(sharded)
    invalidate(sharded)
    assert seen_in_forward(sharded)[0] != stamp
