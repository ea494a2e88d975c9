"""The kernel of `apply_rope`. Imports Triton: to be imported where a CUDA tensor comes in."""
# Triton is in no build of torch for the CPU, and what its language returns is not typed.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from automodel_fn.ops._launch import Launcher
from automodel_fn.ops._rope_rotation import Rotation

# Pairs that a program turns, in as many warps; a block has at most so many heads, which share
# what is read of the tables.
_PAIRS = 2048
_WARPS = 4
_HEADS = 8


@triton.jit
def _turn(
    x, out, x_head, out_head, block, is_token, cos, sin,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    heads = (block * BLOCK_N + tl.arange(0, BLOCK_N))[None, :, None]
    x += heads.to(tl.int64) * x_head
    out += heads.to(tl.int64) * out_head
    is_row = is_token & (heads < HEADS)
    if INTERLEAVED:
        columns = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        mask = is_row & (columns < 2 * HALF)
        both = tl.load(x + columns, mask=mask).to(tl.float32)
        first, second = tl.split(tl.reshape(both, [BLOCK_T, BLOCK_N, BLOCK_HALF, 2]))
        turned = tl.join(first * cos - second * sin, second * cos + first * sin)
        turned = tl.reshape(turned, [BLOCK_T, BLOCK_N, 2 * BLOCK_HALF])
        tl.store(out + columns, turned.to(out.dtype.element_ty), mask=mask)
    else:
        columns = tl.arange(0, BLOCK_HALF)[None, None, :]
        mask = is_row & (columns < HALF)
        first = tl.load(x + columns, mask=mask).to(tl.float32)
        second = tl.load(x + HALF + columns, mask=mask).to(tl.float32)
        turned = first * cos - second * sin
        tl.store(out + columns, turned.to(out.dtype.element_ty), mask=mask)
        turned = second * cos + first * sin
        tl.store(out + HALF + columns, turned.to(out.dtype.element_ty), mask=mask)
    if REST > 0:
        columns = tl.arange(0, BLOCK_REST)[None, None, :]
        mask = is_row & (columns < REST)
        rest = tl.load(x + 2 * HALF + columns, mask=mask)
        tl.store(out + 2 * HALF + columns, rest, mask=mask)


@triton.jit
def _rope(
    q, k, q_out, k_out, cos, sin, position_ids, offset, num_tokens, length, num_positions,
    q_batch, q_token, q_head, k_batch, k_token, k_head,
    q_out_batch, q_out_token, q_out_head, k_out_batch, k_out_token, k_out_head,
    table_batch, table_row, ids_batch, ids_token,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    TABLE_COLUMN: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    block = tl.program_id(1)
    is_token = tokens < num_tokens
    batch, token = (tokens // length).to(tl.int64), (tokens % length).to(tl.int64)
    if position_ids is None:
        positions = token + offset
    else:
        places = position_ids + batch * ids_batch + token * ids_token
        positions = tl.load(places, mask=is_token, other=0).to(tl.int64)
    # A position that the tables do not have gives NaN; nothing is read there.
    is_known = is_token & (positions >= 0) & (positions < num_positions)
    columns = tl.arange(0, BLOCK_HALF)[None, None, :]
    # Every thread reads the rows that it needs: fewer reads would have to be shared out, and wait.
    columns = tl.broadcast_to(columns, [BLOCK_T, BLOCK_N, BLOCK_HALF])
    places = batch * table_batch + positions * table_row + columns * TABLE_COLUMN
    mask = is_known & (columns < HALF)
    c = tl.load(cos + places, mask=mask, other=float("nan")).to(tl.float32)
    s = tl.load(sin + places, mask=mask, other=float("nan")).to(tl.float32)
    if INVERSE:
        s = -s
    Q_BLOCKS: tl.constexpr = (Q_HEADS + BLOCK_N - 1) // BLOCK_N
    if block < Q_BLOCKS:
        x, out = q + batch * q_batch + token * q_token, q_out + batch * q_out_batch
        out += token * q_out_token
        _turn(
            x, out, q_head, q_out_head, block, is_token, c, s,
            Q_HEADS, HALF, REST, INTERLEAVED, BLOCK_T, BLOCK_N, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        x, out = k + batch * k_batch + token * k_token, k_out + batch * k_out_batch
        out += token * k_out_token
        _turn(
            x, out, k_head, k_out_head, block - Q_BLOCKS, is_token, c, s,
            K_HEADS, HALF, REST, INTERLEAVED, BLOCK_T, BLOCK_N, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


class _Unfused:
    """A kernel whose products are rounded before they are added, as torch rounds them."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return partial(self._kernel[grid], enable_fp_fusion=False)


_launch = Launcher(_Unfused(_rope))


def launch_rotation(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, ids: Tensor | None, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """As `rotated_by_torch`, of tensors on one GPU; in the memory order of `q` and of `k`."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    if sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    outputs = torch.empty_like(q), torch.empty_like(k)
    b, t, n = rotation.dimensions
    batch, length = (1 if b is None else q.shape[b]), q.shape[t]
    heads = q.shape[n], k.shape[n]
    num_tokens = batch * length
    half, head_dim = rotation.rotary_dim // 2, q.shape[-1]
    if not num_tokens or not any(heads) or not head_dim:
        return outputs
    strides: list[int] = []
    for x in (q, k, *outputs):
        of = x.stride()
        strides += (0 if b is None else of[b], of[t], of[n])
    block_t, block_n, block_half = _blocks(max(heads), half)
    rest = head_dim - 2 * half
    grid = (-(-num_tokens // block_t), sum(-(-n // block_n) for n in heads), 1)
    _launch(
        grid,
        (
            *(q, k, *outputs, cos, sin, ids, rotation.offset),
            *(num_tokens, length, cos.shape[-2], *strides),
            *(_batch_stride(cos, 3, batch), cos.stride(-2)),
            *((0, 0) if ids is None else (_batch_stride(ids, 2, batch), ids.stride(-1))),
        ),
        (
            *(*heads, half, rest, cos.stride(-1), rotation.interleaved, rotation.inverse),
            *(block_t, block_n, block_half, triton.next_power_of_2(rest)),
        ),
        num_warps=_WARPS,
    )
    return outputs


def _blocks(heads: int, half: int) -> tuple[int, int, int]:
    block_n = min(_HEADS, triton.next_power_of_2(heads))
    block_half = triton.next_power_of_2(half)
    return max(1, _PAIRS // (block_n * block_half)), block_n, block_half


def _batch_stride(x: Tensor, dimensions: int, batch: int) -> int:
    # One row of tables or of positions holds for every example.
    return x.stride(0) if x.dim() == dimensions and x.shape[0] == batch else 0
