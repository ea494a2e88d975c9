"""Strategies for dtypes and tensors, with the values that roundings get wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st

CORNERS: dict[torch.dtype, tuple[int, ...]] = {
    torch.float32: (
        0x3F802FFF,  # 1.001..., which bf16 cannot hold
        0x80000000,  # -0.0
        0x00000001,  # the smallest subnormal
        0x807FFFFF,  # the largest subnormal, negative
        0x7F800000,  # inf
        0x7F800123,  # a signalling NaN with a payload
        0xFFC01234,  # a negative quiet NaN with a payload
        0x3F808000,  # halfway between two bf16, to even is down
        0x3F818000,  # halfway between two bf16, to even is up
        0x7F7FFFFF,  # the largest float32, which rounds to inf
        0x38801000,  # halfway between two fp16
        0x477FF000,  # 65520, the smallest that fp16 makes infinite
        0xB3000000,  # -(2**-25), the largest that fp16 makes zero
    ),
    torch.bfloat16: (
        0x3F81,
        0x8000,
        0x0001,
        0x7F80,
        0x7F81,
        0xFFC5,
        0x7F7F,
        0x0080,
        0x4780,
        0x3300,
    ),
    torch.float16: (0x3C01, 0x8000, 0x0001, 0x7C00, 0x7C01, 0xFE05, 0x7BFF, 0x0400),
    torch.float64: (0x3FF0000000000001, 1 << 63, 1, 0x7FF0000000000001, 0xFFF8000000001234),
    torch.complex64: (0x3F802FFF_80000000, 0x80000000_7F800123, 0x00000001_3F808000),
    torch.float8_e4m3fn: (0x39, 0x80, 0x01, 0x7F, 0xFF),
    torch.float8_e5m2: (0x3D, 0x80, 0x01, 0x7C, 0x7D, 0xFE),
    torch.float8_e8m0fnu: (0x7F, 0x00, 0xFF),
    torch.int64: (3, 0xFFFFFFFFFFFFFFFF, 1 << 63, 0),
    torch.int32: (3, 0xFFFFFFFF, 1 << 31, 0),
    torch.uint8: (3, 255, 0),
    torch.bool: (1, 0),
}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CASTABLE = (torch.float32, torch.bfloat16, torch.float16)


def dtypes(*, castable: bool = False) -> st.SearchStrategy[torch.dtype]:
    """Dtypes of weights and buffers; float32 is the simplest.

    Args:
        castable: Only float32, bfloat16 and float16, which are cast from and to.

    Example:
        >>> from hypothesis import find
        >>> find(dtypes(), lambda dtype: dtype.is_complex)
        torch.complex64
    """
    return st.sampled_from(CASTABLE if castable else tuple(CORNERS))


def tensor_of_bits(
    bits: Sequence[int], dtype: torch.dtype, shape: tuple[int, ...] | None = None
) -> torch.Tensor:
    """The tensor whose elements have these bits.

    Example:
        >>> tensor_of_bits([0x8000, 0x3F80], torch.bfloat16)
        tensor([-0., 1.], dtype=torch.bfloat16)
    """
    size = dtype.itemsize
    data = bytearray(b"".join(value.to_bytes(size, "little") for value in bits))
    if not data:
        return torch.empty(shape or (0,), dtype=dtype)
    flat = torch.frombuffer(data, dtype=_INTEGERS[size]).clone()
    return flat.view(dtype).reshape(shape if shape is not None else (len(bits),))


def corner_tensor(dtype: torch.dtype, shape: tuple[int, ...], start: int = 0) -> torch.Tensor:
    """A tensor that walks through the corner values of its dtype, from the given one on.

    Example:
        >>> corner_tensor(torch.float32, (2,), start=1)
        tensor([-0.0000e+00, 1.4013e-45])
    """
    corners = CORNERS[dtype]
    numel = math.prod(shape)
    return tensor_of_bits([corners[(start + i) % len(corners)] for i in range(numel)], dtype, shape)


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """Small shapes, the scalar and empty ones among them.

    Example:
        >>> from hypothesis import find
        >>> find(shapes(), lambda shape: len(shape) == 2 and 0 not in shape)
        (1, 1)
    """
    return st.lists(st.integers(0, 4), max_size=2).map(tuple)


@st.composite
def tensors(draw: st.DrawFn, dtype: torch.dtype) -> torch.Tensor:
    """Tensors of small shapes; contiguous, transposed, every other column of a wider one, expanded.

    Values are random bits and, more often, the corners: -0.0, subnormals, infinities, NaNs with
    payloads, ties of the rounding to bf16 and fp16.

    Args:
        draw: Given by hypothesis.
        dtype: Their dtype.

    Example:
        >>> from hypothesis import find
        >>> find(tensors(torch.float32), lambda t: t.dim() == 1 and bool(t.isnan().any()))
        tensor([nan])
    """
    shape = draw(shapes())
    layout = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]))
    wide = (*shape[:-1], shape[-1] * 2) if layout == "sliced" and shape else shape
    corners = st.sampled_from(CORNERS[dtype])
    value = corners if dtype == torch.bool else corners | st.integers(0, 256**dtype.itemsize - 1)
    numel = math.prod(wide)
    tensor = tensor_of_bits(draw(st.lists(value, min_size=numel, max_size=numel)), dtype, wide)
    return laid_out(tensor, layout)


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """A tensor of the same or fewer elements in another layout, where its shape has that one.

    "transposed" is of two dimensions, "channels_last" of four; "sliced" is every other column;
    "expanded" is the first column again and again, without memory for each.

    Example:
        >>> laid_out(torch.zeros(2, 4), "sliced").stride()
        (4, 2)
        >>> laid_out(torch.zeros(2, 4), "expanded").stride()
        (4, 0)
    """
    if layout == "transposed" and tensor.dim() == 2:
        return tensor.t()
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.movedim(-1, 1)
    if layout == "sliced" and tensor.dim():
        return tensor[..., ::2]
    if layout == "expanded" and tensor.dim():
        return tensor[..., :1].expand(tensor.shape)
    return tensor
