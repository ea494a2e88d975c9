import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from automodel_fn.compat import nemo

PLAIN = {
    "a plain tensor": lambda: torch.ones(2, 3),
    "a parameter": lambda: nn.Parameter(torch.ones(2)),
    "a scalar": lambda: torch.tensor(1.0),
    "integers": lambda: torch.arange(3),
    "a view": lambda: torch.arange(6.0)[2:],
    "an expanded tensor": lambda: torch.ones(1).expand(4),
}
UNALLOCATED = {
    "a meta tensor": lambda: torch.ones(2, device="meta"),
    "a meta parameter": lambda: nn.Linear(2, 2, device="meta").weight,
    "a fake tensor": lambda: FakeTensorMode().from_tensor(torch.ones(2)),
    "an uninitialized parameter": lambda: nn.LazyLinear(2).weight,
}


def freed():
    tensor = torch.ones(2)
    tensor.untyped_storage().resize_(0)
    return tensor


UNALLOCATED["a tensor whose storage was freed"] = freed


@pytest.mark.parametrize("make", PLAIN.values(), ids=list(PLAIN))
def test_what_has_memory_is_allocated_in_both(make, original):
    assert nemo.is_tensor_unallocated(make()) is original.is_tensor_unallocated(make()) is False


@pytest.mark.parametrize("make", UNALLOCATED.values(), ids=list(UNALLOCATED))
def test_what_has_no_memory_is_unallocated_in_both(make, original):
    assert nemo.is_tensor_unallocated(make()) is original.is_tensor_unallocated(make()) is True


def test_an_empty_tensor_is_allocated_and_was_not(original):
    empty = torch.ones(0, 4)
    assert original.is_tensor_unallocated(empty)
    assert not nemo.is_tensor_unallocated(empty)


def test_a_nested_tensor_is_allocated_and_was_not(original):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    assert original.is_tensor_unallocated(nested)
    assert not nemo.is_tensor_unallocated(nested)


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_a_tensor_inside_a_transform_is_allocated_and_was_not(transform, original):
    seen = []

    def look(x):
        seen.extend([original.is_tensor_unallocated(x), nemo.is_tensor_unallocated(x)])
        return x.sum()

    transform(look)(torch.ones(2, 3))
    assert seen == [True, False]


@pytest.mark.usefixtures("gloo")
def test_a_dtensor_is_allocated_and_was_not(original):
    mesh = init_device_mesh("cpu", (1,))
    sharded = DTensor.from_local(torch.ones(2), mesh, [Replicate()])
    assert original.is_tensor_unallocated(sharded)
    assert not nemo.is_tensor_unallocated(sharded)
