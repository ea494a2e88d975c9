"""The kernel of `apply_rope`. Imports Triton: to be imported where a CUDA tensor comes in."""
# Triton is in no build of torch for the CPU, and what its language returns is not typed.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from functools import lru_cache, partial
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
    Q_BLOCKS: tl.constexpr = (Q_HEADS + BLOCK_N - 1) // BLOCK_N
    BLOCKS: tl.constexpr = Q_BLOCKS + (K_HEADS + BLOCK_N - 1) // BLOCK_N
    # Heads first: while they are turned, the rows of their tokens stay in the cache.
    block = tl.program_id(0) % BLOCKS
    tokens = tl.program_id(0) // BLOCKS * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
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
    if q.stride(-1) != 1 or k.stride(-1) != 1:
        q, k = q.contiguous(), k.contiguous()
    table = cos.stride()
    if sin.stride() != table:
        cos, sin = cos.contiguous(), sin.contiguous()
        table = cos.stride()
    outputs = torch.empty_like(q), torch.empty_like(k)
    strides = (q.stride(), k.stride(), outputs[0].stride(), outputs[1].stride(), table)
    of_ids = None if ids is None else (ids.shape, ids.stride())
    found = _numbers(q.shape, k.shape, cos.shape, strides, of_ids, rotation)
    if found is not None:
        grid, numbers, constants = found
        _launch(grid, (q, k, *outputs, cos, sin, ids, *numbers), constants, num_warps=_WARPS)
    return outputs


@lru_cache(maxsize=1024)
def _numbers(
    of_q: torch.Size,
    of_k: torch.Size,
    of_table: torch.Size,
    strides: tuple[tuple[int, ...], ...],
    of_ids: tuple[torch.Size, tuple[int, ...]] | None,
    rotation: Rotation,
) -> tuple[tuple[int, int, int], tuple[int, ...], tuple[Any, ...]] | None:
    """Grid, arguments and constants of a launch; None where there is nothing to turn."""
    b, t, n = rotation.dimensions
    batch, length, heads = (1 if b is None else of_q[b]), of_q[t], (of_q[n], of_k[n])
    half = rotation.rotary_dim // 2
    rest = of_q[-1] - 2 * half
    if not batch * length * sum(heads):
        return None
    *of_heads, table = strides
    numbers = [rotation.offset, batch * length, length, of_table[-2]]
    for stride in of_heads:
        numbers += (0 if b is None else stride[b], stride[t], stride[n])
    # One row of tables or of positions holds for every example.
    numbers += (table[0] if len(of_table) == 3 and of_table[0] == batch else 0, table[-2])
    if of_ids is not None:
        shape, stride = of_ids
        numbers += (stride[0] if len(shape) == 2 and shape[0] == batch else 0, stride[-1])
    else:
        numbers += (0, 0)
    block_t, block_n, block_half = _blocks(max(heads), half)
    programs = -(-batch * length // block_t) * sum(-(-num // block_n) for num in heads)
    constants = (*heads, half, rest, table[-1], rotation.interleaved, rotation.inverse)
    blocks = (block_t, block_n, block_half, _power_of_two(rest))
    return (programs, 1, 1), tuple(numbers), (*constants, *blocks)


def _blocks(heads: int, half: int) -> tuple[int, int, int]:
    block_n, block_half = min(_HEADS, _power_of_two(heads)), _power_of_two(half)
    return max(1, _PAIRS // (block_n * block_half)), block_n, block_half


def _power_of_two(least: int) -> int:
    return 1 << max(least - 1, 0).bit_length()
