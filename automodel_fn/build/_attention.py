"""Attention and rotary embeddings by backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from automodel_fn.build._arguments import check_arguments
from automodel_fn.build._te_attention import TEAttention
from automodel_fn.errors import ConfigError
from automodel_fn.nn._attention import Attention
from automodel_fn.nn._rotary import RotaryEmbedding
from automodel_fn.ops._rope import RopeConfig


def attention(
    *, backend: str = "sdpa", is_causal: bool = True, scale: float | None = None
) -> nn.Module:
    """Attention: `q` `[B, S, N, D]`, `k` and `v` `[B, S, K, D]` to `[B, S, N, D]`; K divides N.

    Args:
        backend: "sdpa", "eager" (products and a softmax in float32, written out), "flex"
            (compiled at the first call; without gradients on a CPU), or "te" (Transformer Engine's
            `DotProductAttention`, on a GPU: its fast kernels take bf16 or fp16 and a D that is a
            multiple of 8 and at most 256; `v` may be `[B, S, K, V]`).
        is_causal: Whether later tokens are hidden.
        scale: Of the products; None is `D ** -0.5`.

    Returns:
        A module without parameters or state, which is made on any device, also on meta:
        `module(q, k, v)`.

    Raises:
        ConfigError: An unknown backend.
        BackendUnavailableError: Transformer Engine cannot be imported here.

    Source:
        `initialize_attn_module_and_func` (NeMo Automodel).

    Example:
        >>> q, k = torch.ones(1, 3, 4, 8), torch.ones(1, 3, 2, 8)
        >>> attention()(q, k, k).shape
        torch.Size([1, 3, 4, 8])
    """
    check_arguments("attention", backend, ("sdpa", "eager", "flex", "te"), {}, torch.float32)
    if backend == "te":
        return TEAttention(is_causal=is_causal, scale=scale)
    chosen: Any = backend
    return Attention(chosen, is_causal=is_causal, scale=scale)


def rope(
    head_dim: int,
    num_positions: int,
    *,
    config: RopeConfig | float = 10000.0,
    max_position_embeddings: int | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Rotary embeddings: `q` `[B, S, N, D]` and `k` `[B, S, K, D]` turned, one kernel for both.

    Args:
        head_dim: D.
        num_positions: P, the positions that the tables have.
        config: Base and scaling, as `rope_config` reads them from a model's config; a number is the
            base.
        max_position_embeddings: The model's; some scalings need it, see `rope_tables`.
        device: Where the tables are made. On "meta" they have no memory: give them some with
            `to_empty`, then call `reset_parameters()`.

    Returns:
        A module with float32 tables that are in no state dict: `module(q, k, position_ids=0)`.

    Raises:
        ConfigError: A size that is not a positive int, or a config of which there are no tables.

    Example:
        >>> q = torch.ones(1, 3, 2, 8)
        >>> turned, _ = rope(8, 16)(q, q)
        >>> torch.equal(turned[:, 0], q[:, 0])
        True
    """
    sizes: dict[str, object] = {"head_dim": head_dim, "num_positions": num_positions}
    check_arguments("a rotary embedding", "torch", ("torch",), sizes, torch.float32)
    read = config if isinstance(config, RopeConfig) else RopeConfig(_number(config))
    return RotaryEmbedding(
        read,
        head_dim,
        num_positions,
        max_position_embeddings=max_position_embeddings,
        device=device,
    )


def _number(config: object) -> float:
    if isinstance(config, bool) or not isinstance(config, int | float):
        raise ConfigError(f"config={config!r} must be a RopeConfig, or a number, the base.")
    return float(config)
