import itertools
import random

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, settings
from torch import nn

from automodel_fn import bf16, cast_plan
from automodel_fn.testing import models

FIND = settings(
    max_examples=3000,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def parameters(model):
    return list(model.named_parameters(remove_duplicate=False))


def buffers(model):
    return [b for m in model.modules() for b in m._buffers.values() if b is not None]


def all_tensors(model):
    held = [*(p for _, p in parameters(model)), *buffers(model)]
    return list({id(t): t for t in held}.values())


def owners(model):
    return [
        [name for name, p in module._parameters.items() if p is tensor]
        for tensor in model.parameters()
        for module in model.modules()
    ]


def tie_across_modules(model):
    holders = [m for m in model.modules() for p in m._parameters.values() if p is not None]
    return len(set(holders)) > 1 and len({id(p) for _, p in parameters(model)}) < len(set(holders))


def tie_inside_a_module(model):
    return any(len(names) > 1 for names in owners(model))


def shared_buffer(model):
    return len({id(b) for b in buffers(model)}) < len(buffers(model))


def sharing(model):
    pairs = itertools.combinations([t for t in all_tensors(model) if t.numel()], 2)
    return [
        (a, b) for a, b in pairs if a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    ]


def views_of_one_storage(model):
    return any(a.dtype == b.dtype for a, b in sharing(model))


def storage_of_two_dtypes(model):
    return any(a.dtype != b.dtype for a, b in sharing(model))


def module_under_two_names(model):
    named = list(model.named_modules(remove_duplicate=False))
    return len({id(m) for _, m in named}) < len(named)


def fleeting_buffer(model):
    return any(
        m._buffers.get(name) is not None
        for m in model.modules()
        for name in m._non_persistent_buffers_set
    )


def none_entries(model):
    modules = list(model.modules())
    held = [(m._parameters, m._buffers, m._modules) for m in modules]
    return all(any(None in entry[i].values() for entry in held) for i in range(3))


def below_the_root(model, kind):
    return any(type(m).__name__ == kind for m in list(model.modules())[1:])


def trainable_and_frozen(model):
    return len({p.requires_grad for p in model.parameters()}) == 2


def gradient(model):
    return any(p.grad is not None for p in model.parameters())


def transposed(model):
    return any(t.dim() == 2 and t.stride(0) == 1 and t.size(0) > 1 for t in all_tensors(model))


def sliced(model):
    return any(t.dim() and t.numel() > 1 and t.stride(-1) == 2 for t in all_tensors(model))


def declares(kind, below):
    def has(model):
        modules = list(model.modules())[1 if below else 0 :]
        values = [v for m in modules for k, v in vars(m).items() if k.startswith("_keep_in_fp32")]
        return any(type(value) is kind for value in values)

    return has


def pin_by_an_alias(model):
    entries = cast_plan(model, bf16).entries
    return any("by its alias" in entry.reason for entry in entries)


def half_pinned_storage(model):
    entries = cast_plan(model, bf16).entries
    return any("shares its storage" in e.reason and e.action == "keep" for e in entries)


def buffer_that_is_a_parameter(model):
    return any(isinstance(b, nn.Parameter) for b in buffers(model))


def trainable_buffer(model):
    return any(b.requires_grad and not isinstance(b, nn.Parameter) for b in buffers(model))


def one_gradient_for_two(model):
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return len({id(g) for g in grads}) < len(grads)


def expanded(model):
    return any(0 in t.stride() and t.numel() > 1 for t in all_tensors(model))


def expanded_in_a_shared_storage(model):
    return any(0 in (*a.stride(), *b.stride()) and a.dtype == b.dtype for a, b in sharing(model))


def channels_last(model):
    def is_channels_last(t):
        return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()

    return any(is_channels_last(t) for t in all_tensors(model) if t.dim() == 4)


def marked(model):
    return any(vars(p) and p._backward_hooks for p in model.parameters())


def overlapping_pins(model):
    return any(
        len([k for k in vars(m) if k.startswith("_keep_in_fp32")]) == 2 for m in model.modules()
    )


def pinned_parametrization(model):
    entries = cast_plan(model, bf16).entries
    return any("parametrizations" in e.name and e.action == "keep" for e in entries)


def look_alike_of_a_wrapper(model):
    names = [e.name for e in cast_plan(model, bf16).entries]
    return any(".module." in f".{name}" or ".base_model." in f".{name}" for name in names)


FEATURES = (
    tie_across_modules,
    tie_inside_a_module,
    shared_buffer,
    views_of_one_storage,
    storage_of_two_dtypes,
    module_under_two_names,
    fleeting_buffer,
    none_entries,
    trainable_and_frozen,
    gradient,
    transposed,
    sliced,
    pin_by_an_alias,
    half_pinned_storage,
    buffer_that_is_a_parameter,
    trainable_buffer,
    one_gradient_for_two,
    expanded,
    expanded_in_a_shared_storage,
    channels_last,
    marked,
    overlapping_pins,
    pinned_parametrization,
    look_alike_of_a_wrapper,
)


def found(strategy, condition):
    return find(strategy, condition, settings=FIND, random=random.Random(0))


@pytest.mark.parametrize("feature", FEATURES)
def test_models_have(feature):
    assert isinstance(found(models(), feature), nn.Module)


@pytest.mark.parametrize(
    "wrapper",
    ["Compiled", "CheckpointWrapper", "DataParallel", "Replicated", "Sharded", "Adapted"],
)
def test_models_have_wrappers_below_the_root(wrapper):
    found(models(), lambda model: below_the_root(model, wrapper))


@pytest.mark.parametrize("layer", ["weight_norm", "orthogonal", "Doubled"])
def test_models_have_parametrizations(layer):
    kinds = {"weight_norm": "_WeightNorm", "orthogonal": "_Orthogonal", "Doubled": "Doubled"}
    found(models(), lambda model: below_the_root(model, kinds[layer]))


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("kind", [list, tuple, set, frozenset])
def test_models_declare_pins(kind, below):
    found(models(), declares(kind, below))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.complex64,
        torch.float8_e4m3fn,
        torch.float8_e8m0fnu,
        torch.int64,
        torch.bool,
    ],
)
def test_models_have_tensors_that_are_not_cast(dtype):
    def has(model):
        return any(t.dtype == dtype for t in all_tensors(model))

    found(models(), has)
