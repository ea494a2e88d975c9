"""Tensors as bits: comparison, checksum, and the rounding that keeps what was not edited."""

from __future__ import annotations

import torch

from automodel_fn.cast._dtensors import is_distributed, local, on_shards

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20
_MULTIPLIER = 0x5851_F42D_4C95_7F2D
_INCREMENT = 0x1405_7B7E_F767_814F


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory read as integers, so that NaN equals NaN and -0.0 differs from 0.0.

    A view: but where PyTorch conjugates or negates on reading, the values, in memory of their own.

    Example:
        >>> bits(torch.tensor([0.0, -0.0])).tolist()
        [0, -2147483648]
    """
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    size = tensor.dtype.itemsize
    if size not in _INTEGERS:
        raise AssertionError(f"no integer of {size} bytes")
    return tensor.view(_INTEGERS[size])


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit that this rank holds.

    Example:
        >>> same_bits(torch.tensor(float("nan")), torch.tensor(float("nan")))
        True
    """
    if any(getattr(left, what) != getattr(right, what) for what in ("shape", "dtype", "layout")):
        return False
    left, right = local(left), local(right)
    if left.layout is torch.sparse_coo:  # a gradient of an embedding
        pairs = (left._indices(), right._indices()), (left._values(), right._values())
        return all(same_bits(*pair) for pair in pairs)
    return left.is_meta or torch.equal(bits(left), bits(right))


def merged(
    original: torch.Tensor,
    current: torch.Tensor,
    dtype: torch.dtype,
    unedited: torch.Tensor | None = None,
) -> torch.Tensor:
    """`current` in `dtype`, with `original`'s own value wherever `current` is its unedited cast.

    Args:
        original: What was there before a temporary cast.
        current: What is there now, after edits, of any castable dtype.
        dtype: The dtype wanted.
        unedited: What the cast had made of `original`, if that is known; else it is cast again.

    Returns:
        A tensor of `dtype`: elements edited since are the rounding of the edit, the others are the
        original's, bit for bit where `dtype` is its own.

    Example:
        >>> original = torch.tensor([1.001, 2.0])
        >>> current = original.to(torch.bfloat16)
        >>> current[1] = 3.0
        >>> merged(original, current, torch.float32)
        tensor([1.0010, 3.0000])
    """
    if original.shape != current.shape or current.is_meta:
        return current.to(dtype)
    if is_distributed(current):
        rest = () if unedited is None else (unedited,)
        return on_shards(lambda c, o, *u: merged(o, c, dtype, *u), current, original, *rest)
    if unedited is None or unedited.dtype != current.dtype:
        unedited = original.to(current.dtype)
    if current.layout is not torch.strided:
        return (original if same_bits(unedited, current) else current).to(dtype)
    return torch.where(bits(unedited) == bits(current), original.to(dtype), current.to(dtype))


def checksum(tensor: torch.Tensor) -> int:
    """A 64-bit checksum of a tensor's bits in logical order, the same on every device.

    Of a DTensor it is that of this rank's shard.

    Each element is multiplied by an odd number that depends on its place, and the products are
    added modulo 2**64: a change of any one element always shows.

    Example:
        >>> weight = torch.tensor([1.0, 2.0])
        >>> checksum(weight) == checksum(weight.clone()), checksum(weight) == checksum(-weight)
        (True, False)
    """
    tensor = local(tensor)
    if tensor.is_meta:
        return 0
    flat = bits(tensor.detach().contiguous()).reshape(-1)
    total = tensor.numel()
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].to(torch.int64)
        place = torch.arange(start, start + part.numel(), dtype=torch.int64, device=part.device)
        weights = (place * _signed(_MULTIPLIER) + _signed(_INCREMENT)) | 1
        total += int((part * weights).sum())
    return total % 2**64


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
