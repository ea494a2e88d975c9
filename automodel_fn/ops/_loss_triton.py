"""Losses of tokens and gradients of their logits in one Triton kernel. Imported for CUDA only."""
# Triton is in no build of torch for the CPU, and what its language returns is not typed.
# pyright: basic, reportMissingImports=false, reportGeneralTypeIssues=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from automodel_fn.ops._launch import ceil_div
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
def _logits_at(
    logits,
    bias,
    softcap,
    at,
    mask,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Logits with their terms, and what those multiply the gradient by."""
    x = tl.load(logits + at, mask=mask, other=float("-inf"))
    slope = 1.0
    if HAS_BIAS:
        x += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        tanh = _capped(x, softcap)
        x = tl.where(mask, softcap * tanh, float("-inf"))
        slope = 1.0 - tanh * tanh
    return x, slope


@triton.jit
def _sums(
    logits,
    bias,
    softcap,
    VOCABULARY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The logsumexp of a row, and the mean of its logits where that is asked for."""
    # Each lane has its own maximum, so that no block waits for another thread's.
    most = tl.full([BLOCK], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    for start in range(0, VOCABULARY, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x, _ = _logits_at(logits, bias, softcap, at, at < VOCABULARY, HAS_BIAS, HAS_SOFTCAP)
        if HAS_SMOOTHING:
            plain += tl.where(at < VOCABULARY, x, 0.0)
        higher = tl.maximum(most, x)
        total = total * tl.exp(most - higher) + tl.exp(x - higher)
        most = higher
    highest = tl.max(most, 0)
    lse = highest + tl.log(tl.sum(total * tl.exp(most - highest), 0))
    return lse, tl.sum(plain, 0) / VOCABULARY


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
    counts = label != ignore_index
    is_label = (label >= 0) & (label < VOCABULARY)
    lse, loss, factor = 0.0, 0.0, 0.0
    if counts:
        lse, mean = _sums(
            logits, bias, softcap, VOCABULARY, HAS_BIAS, HAS_SOFTCAP, HAS_SMOOTHING, BLOCK
        )
        picked, _ = _logits_at(logits, bias, softcap, label, is_label, HAS_BIAS, HAS_SOFTCAP)
        loss = (1.0 - smoothing) * (lse - picked) + z_loss * lse * lse
        if HAS_SMOOTHING:
            loss += smoothing * (lse - mean)
        loss = tl.where(is_label, loss, float("nan"))
        factor = tl.where(is_label, tl.load(scale + row * scale_stride), float("nan"))
    tl.store(losses + row, loss)
    tl.store(z_losses + row, z_loss * lse * lse)
    if WANTS_GRADIENTS:
        # Backwards: what was read last may still be in the cache.
        last = (VOCABULARY - 1) // BLOCK
        for block in range(0, last + 1):
            at = (last - block) * BLOCK + tl.arange(0, BLOCK)
            # Of a token that is ignored nothing is read.
            mask = (at < VOCABULARY) & counts
            x, slope = _logits_at(logits, bias, softcap, at, mask, HAS_BIAS, HAS_SOFTCAP)
            found = tl.exp(x - lse) * (1.0 + 2.0 * z_loss * lse)
            if HAS_SMOOTHING:
                found -= smoothing / VOCABULARY
            found -= tl.where(at == label, 1.0 - smoothing, 0.0)
            found = tl.where(counts, found * slope * factor, 0.0)
            tl.store(gradients + at, found.to(gradients.dtype.element_ty), mask=at < VOCABULARY)


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
        launched: Any = _multiply[(min(ceil_div(size, _SCALE_BLOCK), _SCALE_PROGRAMS),)]
        with torch.cuda.device_of(values):
            launched(values, factor, size, BLOCK=_SCALE_BLOCK, num_warps=8)
    return values
