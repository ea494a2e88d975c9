import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import orthogonal, weight_norm

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


def normed_parametrization():
    model = nn.ModuleDict(
        {"linear": weight_norm(nn.Linear(2, 3)), "wo": orthogonal(nn.Linear(2, 2))}
    )
    model._keep_in_fp32_modules = {"linear.weight"}
    return model


def adapted():
    inner = holder(norm=nn.Parameter(special(4)), linear=nn.Linear(2, 2).requires_grad_(False))
    inner._keep_in_fp32_modules_strict = ["norm"]
    return holder(base_model=holder(model=inner))


def expanded():
    row = special(1, 4)
    model = holder(table=row.expand(3, 4), scale=nn.Parameter(row[0]), step=special(1).expand(5))
    model.register_buffer("fleeting", special(2, 3)[:, :1].expand(2, 3), persistent=False)
    return model


def channels_last():
    weight = special(2, 3, 2, 2).to(memory_format=torch.channels_last)
    model = holder(weight=nn.Parameter(weight))
    model.weight.grad = special(2, 3, 2, 2)
    return model


def marked():
    model = holder(weight=nn.Parameter(special(4)), norm=nn.Parameter(special(4)))
    model._keep_in_fp32_modules = ["norm"]
    for parameter in model.parameters():
        parameter.is_marked = True
        parameter.register_hook(lambda grad: grad)
        parameter.register_post_accumulate_grad_hook(lambda parameter: None)
    return model


def one_gradient_for_two():
    model = holder(a=nn.Parameter(special(4)), b=nn.Parameter(special(4)))
    model.a.grad = model.b.grad = special(4)
    return model


def out_of_the_range_of_fp16():
    values = [65520.0, -1e30, 2.0**-25, -(2.0**-26), 0.0, -0.0, 1.0, float("inf"), float("nan")]
    model = holder(
        weight=nn.Parameter(torch.tensor(values)), narrow=torch.tensor(values).bfloat16()
    )
    model.weight.grad = torch.tensor(values[::-1])
    return model


def smaller_than_fp16():
    eight = torch.tensor([1.5, -2.0])
    return holder(
        weight=nn.Parameter(special(3)),
        eight=eight.to(torch.float8_e4m3fn),
        scale=torch.tensor([127, 0, 255], dtype=torch.uint8).view(torch.float8_e8m0fnu),
        four=torch.arange(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    )


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
    normed_parametrization,
    adapted,
    expanded,
    channels_last,
    marked,
    one_gradient_for_two,
    out_of_the_range_of_fp16,
    smaller_than_fp16,
)
