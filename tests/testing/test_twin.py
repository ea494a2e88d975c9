import torch
from torch import nn

from automodel_fn.testing._parts import mark
from automodel_fn.testing._twin import bits_of, storage_key, tensors_of, twin_of


def test_a_twin_has_the_same_bits_and_none_of_the_memory(model):
    twin = dict(tensors_of(twin_of(model)))
    for name, tensor in tensors_of(model):
        assert torch.equal(bits_of(twin[name]), bits_of(tensor))
        assert storage_key(twin[name]) != storage_key(tensor)


def test_a_twin_has_the_same_ties_and_views(model):
    twin = twin_of(model)
    assert twin["wo"].tied is twin["wo"].weight
    assert storage_key(twin.left) == storage_key(twin.right)
    assert twin.right.storage_offset() == 4


def test_a_twin_has_gradients_strides_and_attributes():
    layer = nn.Linear(2, 3)
    layer.weight = nn.Parameter(torch.arange(12.0).reshape(2, 6)[:, ::2].t())
    layer.weight.grad, layer.weight.is_embedding = torch.ones(3, 2), True
    twin = twin_of(layer)
    assert twin.weight.stride() == layer.weight.stride()
    assert torch.equal(twin.weight.grad, torch.ones(3, 2))
    assert twin.weight.grad is not layer.weight.grad
    assert twin.weight.is_embedding


def test_a_twin_on_meta_shares_as_the_model_does(model):
    twin = twin_of(model, "meta")
    assert twin.left.is_meta
    assert storage_key(twin.left) == storage_key(twin.right)
    assert storage_key(twin.left) != storage_key(twin["wo"].weight)


def test_a_twin_keeps_the_class_of_a_parameter():
    class Special(nn.Parameter):
        pass

    module = nn.Module()
    module.weight = Special(torch.ones(2))
    assert type(twin_of(module).weight) is Special


def test_a_twin_has_the_hooks_of_the_model(model):
    weight = model["wo"].weight
    mark(weight)
    twin = twin_of(model)["wo"].weight
    assert list(twin._backward_hooks.values()) == list(weight._backward_hooks.values())
    hooks = [list(t._post_accumulate_grad_hooks.values()) for t in (twin, weight)]
    assert hooks[0] == hooks[1] != []


def test_a_gradient_of_two_parameters_has_one_twin():
    layer = nn.LayerNorm(2)
    layer.weight.grad = layer.bias.grad = torch.ones(2)
    twin = twin_of(layer)
    assert twin.weight.grad is twin.bias.grad is not layer.bias.grad
