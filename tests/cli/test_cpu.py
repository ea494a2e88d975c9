import contextlib

import pytest
import torch

from automodel_fn.cli._cpu import NarrowProductsInFloat32, products_in_float32

PRODUCTS = {
    "mm": (torch.mm, (5, 7), (7, 3)),
    "bmm": (torch.bmm, (2, 5, 7), (2, 7, 3)),
    "addmm": (torch.addmm, (3,), (5, 7), (7, 3)),
    "baddbmm": (torch.baddbmm, (2, 5, 3), (2, 5, 7), (2, 7, 3)),
}


def narrow(dtype, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_the_float32_product_rounded(name, dtype):
    function, *shapes = PRODUCTS[name]
    tensors = narrow(dtype, *shapes)
    with NarrowProductsInFloat32():
        found = function(*tensors)

    assert found.dtype == dtype
    assert torch.equal(found, function(*[t.float() for t in tensors]).to(dtype))


def test_scales_of_a_product_are_kept():
    bias, left, right = narrow(torch.bfloat16, (3,), (5, 7), (7, 3))
    with NarrowProductsInFloat32():
        found = torch.addmm(bias, left, right, beta=0.5, alpha=2.0)

    wide = torch.addmm(bias.float(), left.float(), right.float(), beta=0.5, alpha=2.0)
    assert torch.equal(found, wide.bfloat16())


def test_gradients_are_float32_products_rounded():
    left, right = narrow(torch.bfloat16, (5, 7), (7, 3))
    with NarrowProductsInFloat32():
        (left.requires_grad_() @ right).sum().backward()

    expected = torch.ones(5, 3) @ right.float().T
    assert torch.equal(left.grad, expected.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_products_are_left_as_they_are(dtype):
    left, right = narrow(dtype, (5, 7), (7, 3))
    with NarrowProductsInFloat32():
        found = left @ right

    assert torch.equal(found, left @ right)


def context(monkeypatch, dtype, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    remarks = []
    return products_in_float32(dtype, remarks.append), remarks


def test_a_cpu_without_narrow_products_gets_the_mode_and_a_remark(monkeypatch):
    mode, remarks = context(monkeypatch, torch.bfloat16, "AVX2")

    assert isinstance(mode, NarrowProductsInFloat32)
    assert remarks == [
        "this CPU (AVX2) has no fast bfloat16 matrix products: they are computed in float32 and "
        "rounded to bfloat16"
    ]


@pytest.mark.parametrize(
    ("dtype", "capability"), [(torch.bfloat16, "AVX512"), (torch.float32, "AVX2")]
)
def test_where_nothing_is_missing_nothing_is_changed(monkeypatch, dtype, capability):
    mode, remarks = context(monkeypatch, dtype, capability)

    assert isinstance(mode, contextlib.nullcontext)
    assert remarks == []
