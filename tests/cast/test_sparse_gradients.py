"""Gradients of embeddings that are sparse are cast with their tensors."""

import pytest
import torch
from torch import nn

from automodel_fn import apply, bf16, cast_plan, fp16, fp32, temporary_cast
from automodel_fn.cast._batches import batches_of, conversions_of
from automodel_fn.cast._tensors import scan


@pytest.fixture
def model():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    model(torch.tensor([1, 2, 1])).sum().backward()
    assert model[0].weight.grad.is_sparse
    return model


@pytest.mark.parametrize("dtype", [bf16, fp16])
def test_a_sparse_gradient_is_cast_with_its_tensor_and_training_goes_on(model, dtype):
    grad = model[0].weight.grad
    expected = grad.to(dtype).to_dense()

    apply(cast_plan(model, dtype))

    assert model[0].weight.grad is grad
    assert grad.dtype == dtype
    assert torch.equal(grad.to_dense(), expected)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_undo_brings_a_sparse_gradient_back(model):
    before = model[0].weight.grad.to_dense()

    apply(cast_plan(model, bf16), keep_originals=True).undo()

    assert torch.equal(model[0].weight.grad.to_dense(), before)


def test_a_sparse_gradient_is_converted_apart_and_takes_what_its_values_take(model):
    # As a gradient of the dense tensor it would set aside as much as that.
    tensors = [item.tensor for item in scan(model).tensors]
    batches = batches_of(cast_plan(model, bf16).entries, scan(model).tensors, groups=())
    found = [c for c in conversions_of(batches, tensors) if not c.is_weight]

    assert [c.names for c in found] == [("0.weight.grad",), ("1.weight.grad", "1.bias.grad")]
    values = model[0].weight.grad._values()
    assert found[0].num_bytes == values.numel() * bf16.itemsize


@pytest.mark.parametrize("is_edited", [False, True])
def test_a_temporary_cast_brings_a_sparse_gradient_back(model, is_edited):
    before = model[0].weight.grad.to_dense()

    with temporary_cast(model, bf16):
        if is_edited:
            model(torch.tensor([3])).sum().backward()

    grad = model[0].weight.grad
    assert grad.dtype == fp32
    assert torch.equal(grad.to_dense(), before) != is_edited
