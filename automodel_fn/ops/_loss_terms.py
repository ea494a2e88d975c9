"""What the loss of a language model's head is made of, and in which chunks it is computed.

Shapes: T is tokens, H the hidden dimension, V the vocabulary.
"""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

# Gradients of logits are held for one product with all hidden states up to so many bytes: 8192
# tokens of a vocabulary of 128256 in bfloat16. Where they are more, the sum of several products
# needs memory too, and chunks are smaller.
_HELD_AT_ONCE, _HELD_OF_MORE = 2**31, 2**30
# Logits of few tokens take longer to multiply, and more than these do not take less.
_LEAST_ROWS, _MOST_ROWS = 64, 1024
_STEP = 128


@attrs.frozen
class LossTerms:
    """The terms of the loss of a token, beside its hidden state, the head and its label.

    Args:
        ignore_index: The label of tokens that do not count.
        label_smoothing: The part of the target that is spread over the vocabulary.
        z_loss: What the square of the log of the softmax's denominator is multiplied by.
        softcap: Logits become `softcap * tanh(logits / softcap)`; None leaves them.
    """

    ignore_index: int = attrs.field(kw_only=True)
    label_smoothing: float = attrs.field(kw_only=True)
    z_loss: float = attrs.field(kw_only=True)
    softcap: float | None = attrs.field(kw_only=True)


@attrs.frozen
class ChunkSizes:
    """How many tokens are worked on at a time.

    Args:
        held: Tokens whose gradients of logits are held, for one product with the hidden states.
        rows: Tokens whose logits are held, in the dtype of sums.
    """

    held: int
    rows: int = attrs.field(kw_only=True)


def chunk_sizes(
    num_tokens: int,
    vocabulary: int,
    dtype: torch.dtype,
    chunk_size: int | None,
    *,
    wants_weight: bool = True,
) -> ChunkSizes:
    """The chunks for so many tokens: where they choose themselves, of even sizes.

    Args:
        num_tokens: T.
        vocabulary: V.
        dtype: Of the gradients of the logits.
        chunk_size: What the caller wants held, or None.
        wants_weight: Whether the weight has a gradient. If not, nothing is gained by holding more
            than what is computed at a time.

    Example:
        >>> chunk_sizes(16384, 128256, torch.bfloat16, None)
        ChunkSizes(held=4096, rows=1024)
    """
    part = 16 if wants_weight else 4
    rows = min(max(-(-num_tokens // part), _LEAST_ROWS), _MOST_ROWS)
    if chunk_size is None:
        chunk_size = _even(num_tokens, vocabulary * dtype.itemsize, dtype) if wants_weight else rows
    held = min(chunk_size, max(num_tokens, 1))
    return ChunkSizes(held, rows=min(rows, held))


def _even(num_tokens: int, row_bytes: int, dtype: torch.dtype) -> int:
    # float32 gradients are in the memory of float32 logits: to hold fewer costs little.
    at_once = _HELD_AT_ONCE if dtype.itemsize < 4 else _HELD_OF_MORE
    if num_tokens * row_bytes <= at_once:
        return max(num_tokens, 1)
    most = max(_HELD_OF_MORE // row_bytes, 1)
    even = -(-num_tokens // -(-num_tokens // most))
    return min(-(-even // _STEP) * _STEP, most)


def write_token_losses(
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    terms: LossTerms,
    losses: Tensor,
    z_losses: Tensor,
    gradients: Tensor | None,
) -> None:
    """Write the losses of tokens, and the gradients of their logits, with torch's own operators.

    Args:
        logits: `[t, V]`, in the dtype of sums.
        labels: `[t]`, integers.
        bias: `[V]`, added to the logits, or None.
        scale: `[t]` or `[]`: what the gradients are multiplied by.
        terms: The terms of the loss.
        losses: `[t]`, written: the loss with all its terms; 0 for a label that is ignored, NaN (and
            so its gradients) for one that is not in the vocabulary.
        z_losses: `[t]`, written: the part of it that is the z-loss.
        gradients: `[t, V]`, written; None where no gradient is wanted.
    """
    if bias is not None:
        logits = logits + bias
    slopes = None
    if terms.softcap is not None:
        capped = torch.tanh(logits / terms.softcap)
        logits, slopes = terms.softcap * capped, 1 - capped.square()
    counts = labels != terms.ignore_index
    is_label = (labels >= 0) & (labels < logits.shape[1])
    index = torch.where(is_label, labels, 0).long().unsqueeze(1)
    lse = torch.logsumexp(logits, -1)
    smoothing = terms.label_smoothing
    loss = (1 - smoothing) * (lse - logits.gather(1, index).squeeze(1))
    if smoothing:
        loss = loss + smoothing * (lse - logits.mean(-1))
    z_loss = terms.z_loss * lse.square()
    losses.copy_(torch.where(counts, torch.where(is_label, loss + z_loss, math.nan), 0))
    z_losses.copy_(torch.where(counts, z_loss, 0))
    if gradients is None:
        return
    found = torch.exp(logits - lse.unsqueeze(1))
    found *= (1 + 2 * terms.z_loss * lse).unsqueeze(1)
    found -= smoothing / logits.shape[1]
    found.scatter_add_(1, index, torch.full_like(index, smoothing - 1, dtype=found.dtype))
    if slopes is not None:
        found *= slopes
    found *= torch.where(is_label, scale, math.nan).unsqueeze(1)
    gradients.copy_(found.masked_fill_(~counts.unsqueeze(1), 0))
