"""Losses of tokens and gradients of their logits in one Triton kernel. Imported for CUDA only."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from automodel_fn.ops._loss_terms import LossTerms

_BLOCK, _NUM_WARPS = 2048, 8
_SCALE_BLOCK, _SCALE_PROGRAMS = 4096, 1056


@triton.jit
def _capped(x, softcap):
    """The tanh of x / softcap, without the loss of digits near 0 that exponentials have."""
    x = x / softcap
    square = x * x
    series = 62.0 / 2835
    series = series * square - 17.0 / 315
    series = series * square + 2.0 / 15
    series = series * square - 1.0 / 3
    series = x * (series * square + 1.0)
    return tl.where(tl.abs(x) < 0.25, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def _token_losses(
    logits,
    labels,
    bias,
    scale,
    losses,
    z_losses,
    gradients,
    logits_stride,
    gradients_stride,
    scale_stride,
    ignore_index,
    smoothing,
    z_loss,
    softcap,
    VOCABULARY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    WANTS_GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    gradients += row * gradients_stride
    label = tl.load(labels + row)
    lanes = tl.arange(0, BLOCK)
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        tl.store(z_losses + row, 0.0)
        if WANTS_GRADIENTS:
            for start in range(0, VOCABULARY, BLOCK):
                at = start + lanes
                zeros = tl.zeros([BLOCK], gradients.dtype.element_ty)
                tl.store(gradients + at, zeros, mask=at < VOCABULARY)
        return
    is_label = (label >= 0) & (label < VOCABULARY)
    # Each lane has its own maximum, so that no block waits for another thread's.
    most = tl.full([BLOCK], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    for start in range(0, VOCABULARY, BLOCK):
        at = start + lanes
        x = tl.load(logits + at, mask=at < VOCABULARY, other=float("-inf"))
        if HAS_BIAS:
            x += tl.load(bias + at, mask=at < VOCABULARY, other=0.0).to(tl.float32)
        if HAS_SOFTCAP:
            x = tl.where(at < VOCABULARY, softcap * _capped(x, softcap), float("-inf"))
        if HAS_SMOOTHING:
            plain += tl.where(at < VOCABULARY, x, 0.0)
        higher = tl.maximum(most, x)
        total = total * tl.exp(most - higher) + tl.exp(x - higher)
        most = higher
    highest = tl.max(most, 0)
    lse = highest + tl.log(tl.sum(total * tl.exp(most - highest), 0))
    picked = tl.load(logits + label, mask=is_label, other=float("nan"))
    if HAS_BIAS:
        picked += tl.load(bias + label, mask=is_label, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        picked = softcap * _capped(picked, softcap)
    loss = (1.0 - smoothing) * (lse - picked)
    if HAS_SMOOTHING:
        loss += smoothing * (lse - tl.sum(plain, 0) / VOCABULARY)
    of_z = z_loss * lse * lse
    tl.store(losses + row, loss + of_z)
    tl.store(z_losses + row, of_z)
    if WANTS_GRADIENTS:
        factor = tl.load(scale + row * scale_stride).to(tl.float32)
        factor = tl.where(is_label, factor, float("nan"))
        of_softmax = 1.0 + 2.0 * z_loss * lse
        # Backwards: what was read last may still be in the cache.
        last = (VOCABULARY - 1) // BLOCK
        for block in range(0, last + 1):
            at = (last - block) * BLOCK + lanes
            x = tl.load(logits + at, mask=at < VOCABULARY, other=float("-inf"))
            if HAS_BIAS:
                x += tl.load(bias + at, mask=at < VOCABULARY, other=0.0).to(tl.float32)
            slope = factor
            if HAS_SOFTCAP:
                tanh = _capped(x, softcap)
                x = softcap * tanh
                slope = factor * (1.0 - tanh * tanh)
            found = tl.exp(x - lse) * of_softmax
            if HAS_SMOOTHING:
                found -= smoothing / VOCABULARY
            found -= tl.where(at == label, 1.0 - smoothing, 0.0)
            found = (found * slope).to(gradients.dtype.element_ty)
            tl.store(gradients + at, found, mask=at < VOCABULARY)


@triton.jit
def _multiply(values, factor, size, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by == 1.0:
        return
    start = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    while start < size:
        at = start + tl.arange(0, BLOCK)
        value = tl.load(values + at, mask=at < size)
        scaled = (value.to(tl.float32) * by).to(values.dtype.element_ty)
        tl.store(values + at, scaled, mask=at < size)
        start += step


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
    """As `write_token_losses` of torch's own operators; `gradients` may be `logits` itself."""
    launched: Any = _token_losses[(len(labels),)]
    written = logits if gradients is None else gradients
    with torch.cuda.device_of(logits):
        launched(
            logits,
            labels,
            bias,
            scale,
            losses,
            z_losses,
            written,
            logits.stride(0),
            written.stride(0),
            scale.stride(0) if scale.dim() else 0,
            terms.ignore_index,
            terms.label_smoothing,
            terms.z_loss,
            1.0 if terms.softcap is None else terms.softcap,
            VOCABULARY=logits.shape[1],
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=terms.softcap is not None,
            HAS_SMOOTHING=terms.label_smoothing > 0,
            WANTS_GRADIENTS=gradients is not None,
            BLOCK=_BLOCK,
            num_warps=_NUM_WARPS,
        )


def multiply_(values: Tensor, factor: Tensor) -> Tensor:
    """Multiply in place, without waiting for the device; a factor of 1 leaves memory untouched.

    Args:
        values: Contiguous, floating point.
        factor: `[]`, on the same device.
    """
    size = values.numel()
    if size:
        launched: Any = _multiply[(min(triton.cdiv(size, _SCALE_BLOCK), _SCALE_PROGRAMS),)]
        with torch.cuda.device_of(values):
            launched(values, factor, size, BLOCK=_SCALE_BLOCK, num_warps=8)
    return values
