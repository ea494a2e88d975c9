"""Attention of queries to keys, as a module without parameters.

Shapes: B examples, S tokens, N heads of queries, K heads of keys and values (N is a multiple of K),
D values of a head.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AttentionBackend = Literal["sdpa", "eager", "flex"]


class Attention(nn.Module):
    """`softmax(q k^T * scale) v`, where a token sees itself and those before it, or all.

    Args:
        backend: "sdpa" (`F.scaled_dot_product_attention`), "eager" (products and a softmax in
            float32) or "flex" (`flex_attention`, compiled at the first call; without gradients on a
            CPU).
        is_causal: Whether later tokens are hidden.
        scale: Of the products; None is `D ** -0.5`.

    Example:
        >>> q = torch.ones(1, 3, 2, 4)
        >>> Attention("eager", is_causal=True, scale=None)(q, q, q).shape
        torch.Size([1, 3, 2, 4])
    """

    def __init__(self, backend: AttentionBackend, *, is_causal: bool, scale: float | None) -> None:
        super().__init__()
        self.backend: AttentionBackend = backend
        self.is_causal, self.scale = is_causal, scale

    def reset_parameters(self) -> None:
        """Nothing is to be filled."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of `q` `[B, S, N, D]`, `k` and `v` `[B, S, K, D]`: `[B, S, N, D]`."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        attend = {"sdpa": _sdpa, "eager": attention_reference, "flex": _flex}[self.backend]
        return attend(q, k, v, self.is_causal, self.scale).transpose(1, 2)

    def extra_repr(self) -> str:
        """Its options, for `repr`."""
        return f"{self.backend}, is_causal={self.is_causal}, scale={self.scale}"


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None
) -> Tensor:
    """The same written out, of heads first: `q` `[B, N, S, D]`, `k` and `v` `[B, K, S, D]`.

    Example:
        >>> x = torch.ones(1, 1, 2, 4)
        >>> attention_reference(x, x, x, True, None).shape
        torch.Size([1, 1, 2, 4])
    """
    times = q.shape[1] // k.shape[1]
    k, v = (each.repeat_interleave(times, dim=1) for each in (k, v))
    products = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        later = torch.ones(products.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        products = products.masked_fill(later, float("-inf"))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return products.softmax(-1, dtype=wide).to(q.dtype) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    is_grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=is_causal, scale=scale, enable_gqa=is_grouped
    )


def _flex(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask: Any = None
    if is_causal:
        mask = create_block_mask(_is_before, None, None, q.shape[2], k.shape[2], device=q.device)
    is_compiling = torch.compiler.is_compiling()
    attend: Any = flex_attention if is_compiling else _compiled(flex_attention)
    is_grouped = q.shape[1] != k.shape[1]
    return attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=is_grouped)


_compiled = functools.cache(torch.compile)


def _is_before(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key
