"""How queries and keys are turned, as a value, and the turning in torch's own operators."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Layout = Literal["bshd", "bhsd", "thd"]
# Where the examples, the tokens and the heads are; None: there is one example.
DIMENSIONS: dict[str, tuple[int | None, int, int]] = {
    "bshd": (0, 1, 2),
    "bhsd": (0, 2, 1),
    "thd": (None, 0, 1),
}


class Rotation(NamedTuple):
    """What `apply_rope` is asked for, beside tensors. A tuple, which costs next to nothing to make.

    Args:
        rotary_dim: How many values of a head are turned, the first ones.
        layout: Of queries and keys.
        offset: The position of the first token, where there are no position ids.
        interleaved: Whether neighbours are a pair; else a value and the one half of them later.
        inverse: Whether it is turned back.

    Example:
        >>> Rotation(64, "bhsd").dimensions
        (0, 2, 1)
    """

    rotary_dim: int
    layout: str
    offset: int = 0
    interleaved: bool = False
    inverse: bool = False

    @property
    def dimensions(self) -> tuple[int | None, int, int]:
        """Where the examples, the tokens and the heads are."""
        return DIMENSIONS[self.layout]

    def inverted(self) -> Rotation:
        """The rotation back."""
        return self._replace(inverse=not self.inverse)


def rotated_by_torch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, ids: Tensor | None, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """The plain rotation: every product rounded, then their sum; the result rounded once.

    Float64 is computed in float64, all else in float32. Differentiable, in any order.

    Example:
        >>> x, cos, sin = torch.tensor([[[1.0, 2.0]]]), torch.zeros(1, 1), torch.ones(1, 1)
        >>> rotated_by_torch(x, x, cos, sin, None, Rotation(2, "thd"))[0]
        tensor([[[-2.,  1.]]])
    """
    cos, sin = _factors(q, cos, sin, ids, rotation)
    return _turned(q, cos, sin, rotation), _turned(k, cos, sin, rotation)


def rotated_below_autograd(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, ids: Tensor | None, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """The same bits with fewer copies, laid out as `torch.empty_like` lays out; no gradients.

    Example:
        >>> x, cos, sin = torch.tensor([[[1.0, 2.0]]]), torch.zeros(1, 1), torch.ones(1, 1)
        >>> rotated_below_autograd(x, x, cos, sin, None, Rotation(2, "thd"))[0]
        tensor([[[-2.,  1.]]])
    """
    cos, sin = _factors(q, cos, sin, ids, rotation)
    outputs = torch.empty_like(q), torch.empty_like(k)
    for x, out in zip((q, k), outputs, strict=True):
        first, second = _pairs(x[..., : rotation.rotary_dim].to(cos.dtype), rotation)
        of_first, of_second = _pairs(out[..., : rotation.rotary_dim], rotation)
        of_first.copy_((first * cos).sub_(second * sin))
        of_second.copy_((second * cos).add_(first * sin))
        out[..., rotation.rotary_dim :] = x[..., rotation.rotary_dim :]
    return outputs


def _factors(
    q: Tensor, cos: Tensor, sin: Tensor, ids: Tensor | None, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """The cosine and sine of every token, to be multiplied with halves of heads."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    length = q.shape[rotation.dimensions[1]]
    cos, sin = (_rows(table, ids, length, rotation).to(dtype) for table in (cos, sin))
    return cos, -sin if rotation.inverse else sin


def _rows(table: Tensor, ids: Tensor | None, length: int, rotation: Rotation) -> Tensor:
    table = table[..., : rotation.rotary_dim // 2]
    if table.dim() == 2 and ids is None:
        table = table[rotation.offset : rotation.offset + length]
    elif ids is not None:
        # Unlike table[ids], this refuses a negative position.
        found = table.index_select(0, ids.reshape(-1))
        table = found.view(*ids.shape, found.shape[-1])
    if rotation.layout == "thd" and table.dim() == 3:
        table = table.squeeze(0)
    heads = -3 if rotation.layout == "bhsd" else -2
    return table.unsqueeze(heads)


def _pairs(x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    if rotation.interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = rotation.rotary_dim // 2
    return x[..., :half], x[..., half:]


def _turned(x: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation) -> Tensor:
    size = rotation.rotary_dim
    first, second = _pairs(x[..., :size].to(cos.dtype), rotation)
    pair = first * cos - second * sin, second * cos + first * sin
    turned = torch.stack(pair, -1).flatten(-2) if rotation.interleaved else torch.cat(pair, -1)
    turned = turned.to(x.dtype)
    return turned if size == x.shape[-1] else torch.cat([turned, x[..., size:]], -1)
