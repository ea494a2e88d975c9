"""Rotary embeddings with their tables, as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from automodel_fn.ops._apply_rope import apply_rope
from automodel_fn.ops._rope import RopeConfig
from automodel_fn.ops._rope_tables import rope_tables


class RotaryEmbedding(nn.Module):
    """Turns queries and keys by the angles of their positions; see `apply_rope`.

    The tables `[P, R / 2]` are float32 buffers that are in no state dict, and no cast that leaves
    out what is not persistent rounds them.

    Args:
        config: Base and scaling of the frequencies.
        head_dim: D, of which `config.partial_rotary_factor` is turned.
        num_positions: P.
        max_position_embeddings: The model's; see `rope_tables`.
        device: Where the tables are.

    Example:
        >>> rotary = RotaryEmbedding(RopeConfig(10000.0), 4, 8)
        >>> q = torch.ones(1, 3, 2, 4)
        >>> [each.shape for each in rotary(q, q)], list(rotary.state_dict())
        ([torch.Size([1, 3, 2, 4]), torch.Size([1, 3, 2, 4])], [])
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: RopeConfig,
        head_dim: int,
        num_positions: int,
        *,
        max_position_embeddings: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.head_dim, self.num_positions = config, head_dim, num_positions
        self.max_position_embeddings = max_position_embeddings
        tables = self._tables(device)
        self.register_buffer("cos", tables.cos, persistent=False)
        self.register_buffer("sin", tables.sin, persistent=False)

    def _tables(self, device: torch.device | str | None) -> Any:
        return rope_tables(
            self.config,
            self.head_dim,
            self.num_positions,
            max_position_embeddings=self.max_position_embeddings,
            device=device,
        )

    def reset_parameters(self) -> None:
        """Fill the tables anew, after `to_empty`."""
        tables = self._tables(self.cos.device)
        self.cos, self.sin = tables.cos, tables.sin

    def forward(
        self, q: Tensor, k: Tensor, position_ids: Tensor | int = 0
    ) -> tuple[Tensor, Tensor]:
        """`q` `[B, S, N, D]` and `k` `[B, S, K, D]` turned; `position_ids` as for `apply_rope`."""
        return apply_rope(q, k, self.cos, self.sin, position_ids=position_ids)
