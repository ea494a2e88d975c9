import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from automodel_fn.testing import models  # noqa: F401 - fails early where hypothesis is missing

SPECIAL = (
    0x3F802FFF,
    -0x80000000,
    0x00000001,
    0x7F800000,
    0x7F800123,
    -0x003FEDCC,
    0x3F808000,
    0x3F818000,
    0x7F7FFFFF,
    0x38801000,
)


def special(*shape):
    numel = torch.Size(shape).numel()
    repeated = (SPECIAL * (numel // len(SPECIAL) + 1))[:numel]
    return torch.tensor(repeated, dtype=torch.int32).view(torch.float32).reshape(shape).clone()


def holder(**tensors):
    module = nn.Module()
    for name, value in tensors.items():
        if isinstance(value, nn.Parameter | nn.Module):
            setattr(module, name, value)
        else:
            module.register_buffer(name, value)
    return module


def empty():
    return nn.Module()


def specials():
    return holder(scale=nn.Parameter(special(10)), table=special(4, 10).t())


def tied_pin():
    model = holder(embed=holder(weight=nn.Parameter(special(10))), norm=nn.Module())
    model.norm.weight = model.embed.weight
    model._keep_in_fp32_modules = ("norm",)
    return model


def half_pinned_storage():
    flat = special(20)
    model = holder(norm=nn.Parameter(flat[:12]), other=nn.Parameter(flat[8:]), table=flat[::2])
    model._keep_in_fp32_modules_strict = {"norm"}
    return model


def two_dtypes_of_one_storage():
    flat = special(8)
    return holder(weight=nn.Parameter(flat), as_integers=flat.view(torch.int32))


def pin_in_less():
    model = holder(norm=nn.Parameter(special(10).half()), weight=nn.Parameter(special(10)))
    model._keep_in_fp32_modules = ["norm"]
    return model


def with_gradient():
    model = holder(weight=nn.Parameter(special(2, 5).t()), frozen=nn.Parameter(special(3), False))
    model.weight.grad = special(5, 2)
    return model


def wrapped():
    inner = holder(norm=nn.Parameter(special(3)), linear=nn.Linear(2, 2))
    inner._keep_in_fp32_modules = ["norm"]
    return nn.DataParallel(holder(block=checkpoint_wrapper(inner)))


def registered_twice():
    block = holder(weight=nn.Parameter(special(10)))
    block.register_buffer("inv_freq", special(4), persistent=False)
    return nn.ModuleDict({"norm": block, "wo": block})


def adapter():
    model = holder(base=nn.Parameter(special(10), False), table=special(3))
    model.lora = holder(weight=nn.Parameter(special(4)))
    return holder(layer=model, tower=nn.Linear(2, 2).requires_grad_(False))


CORNERS = (
    empty,
    specials,
    tied_pin,
    half_pinned_storage,
    two_dtypes_of_one_storage,
    pin_in_less,
    with_gradient,
    wrapped,
    registered_twice,
    adapter,
)
