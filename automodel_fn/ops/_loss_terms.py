"""What the loss of a language model's head is made of, and in which chunks it is computed.

Shapes: T is tokens, H the hidden dimension, V the vocabulary.
"""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

# The widest gradient of logits that is held: 4096 tokens of a vocabulary of 128256 in bfloat16.
_HELD_BYTES = 2**30
# float32 logits of at most so many tokens, and of at most an eighth of all, exist at a time: more
# do not make the products faster, fewer do make them slower.
_MOST_ROWS, _LEAST_ROWS = 512, 64


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
    num_tokens: int, vocabulary: int, dtype: torch.dtype, chunk_size: int | None
) -> ChunkSizes:
    """The chunks for so many tokens.

    Args:
        num_tokens: T.
        vocabulary: V.
        dtype: Of the gradients of the logits.
        chunk_size: What the caller wants held; None: as many as fit into a GiB.

    Example:
        >>> chunk_sizes(16384, 128256, torch.bfloat16, None)
        ChunkSizes(held=4096, rows=512)
    """
    rows = min(max(-(-num_tokens // 8), _LEAST_ROWS), _MOST_ROWS)
    if chunk_size is None:
        fitting = _HELD_BYTES // max(vocabulary * dtype.itemsize, 1)
        chunk_size = max(fitting // rows, 1) * rows
    held = min(chunk_size, max(num_tokens, 1))
    return ChunkSizes(held, rows=min(rows, held))


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
