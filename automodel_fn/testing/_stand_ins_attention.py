"""Stand-ins for Transformer Engine's two composite modules, which pass the microbatch on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def attention_stand_ins(
    linear: type[Any], layer_norm_linear: type[Any], layer_norm_mlp: type[Any]
) -> tuple[type[Any], type[Any]]:
    """New `MultiheadAttention` and `TransformerLayer` over classes of that kind."""
    attention = _multihead_attention(linear, layer_norm_linear)
    return attention, _transformer_layer(attention, layer_norm_mlp)


def _multihead_attention(linear: type[Any], layer_norm_linear: type[Any]) -> type[Any]:
    class MultiheadAttention(nn.Module):
        def __init__(self, hidden_size: int, num_attention_heads: int) -> None:
            super().__init__()
            self.num_heads = num_attention_heads
            self.layernorm_qkv = layer_norm_linear(hidden_size, 3 * hidden_size)
            self.proj = linear(hidden_size, hidden_size)

        def forward(
            self,
            hidden_states: torch.Tensor,
            attention_mask: Any = None,
            encoder_output: torch.Tensor | None = None,
            attn_mask_type: str | None = None,
            window_size: tuple[int, int] | None = None,
            bottom_right_diagonal: bool | None = None,
            is_first_microbatch: bool | None = None,
            checkpoint_core_attention: bool = False,
            inference_params: Any = None,
            rotary_pos_emb: Any = None,
            core_attention_bias_type: str = "no_bias",
            core_attention_bias: torch.Tensor | None = None,
            alibi_slopes: torch.Tensor | None = None,
            cu_seqlens_q: torch.Tensor | None = None,
            cu_seqlens_kv: torch.Tensor | None = None,
            cu_seqlens_q_padded: torch.Tensor | None = None,
            cu_seqlens_kv_padded: torch.Tensor | None = None,
            max_seqlen_q: int | None = None,
            max_seqlen_kv: int | None = None,
            fast_zero_fill: bool = True,
            pad_between_seqs: bool | None = None,
            thd_attention_policies: Any = None,
            thd_attention_policy_dispatch: str = "auto",
            softcap: float | None = None,
        ) -> torch.Tensor:
            fused = self.layernorm_qkv(hidden_states, is_first_microbatch=is_first_microbatch)
            # [S, B, H] to [B, heads, S, head size]
            heads = (
                part.unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0, 3)
                for part in fused.chunk(3, dim=-1)
            )
            context = F.scaled_dot_product_attention(*heads).permute(2, 0, 1, 3).flatten(2)
            return self.proj(context, is_first_microbatch=is_first_microbatch)

    return MultiheadAttention


def _transformer_layer(attention: type[Any], layer_norm_mlp: type[Any]) -> type[Any]:
    class TransformerLayer(nn.Module):
        def __init__(
            self, hidden_size: int, ffn_hidden_size: int, num_attention_heads: int
        ) -> None:
            super().__init__()
            self.self_attention = attention(hidden_size, num_attention_heads)
            self.layernorm_mlp = layer_norm_mlp(hidden_size, ffn_hidden_size)

        def forward(
            self,
            hidden_states: torch.Tensor,
            attention_mask: torch.Tensor | None = None,
            self_attn_mask_type: str | None = None,
            window_size: tuple[int, int] | None = None,
            bottom_right_diagonal: bool | None = None,
            encoder_output: torch.Tensor | None = None,
            enc_dec_attn_mask: Any = None,
            enc_dec_attn_mask_type: str | None = None,
            enc_dec_window_size: tuple[int, int] | None = None,
            enc_dec_bottom_right_diagonal: bool | None = None,
            is_first_microbatch: bool | None = None,
            checkpoint_core_attention: bool = False,
            inference_params: Any = None,
            rotary_pos_emb: Any = None,
            core_attention_bias_type: str = "no_bias",
            core_attention_bias: torch.Tensor | None = None,
            alibi_slopes: torch.Tensor | None = None,
            cu_seqlens_q: torch.Tensor | None = None,
            cu_seqlens_kv: torch.Tensor | None = None,
            cu_seqlens_q_padded: torch.Tensor | None = None,
            cu_seqlens_kv_padded: torch.Tensor | None = None,
            max_seqlen_q: int | None = None,
            max_seqlen_kv: int | None = None,
            fast_zero_fill: bool = True,
            pad_between_seqs: bool | None = None,
            thd_attention_policies: Any = None,
            thd_attention_policy_dispatch: str = "auto",
            softcap: float | None = None,
        ) -> torch.Tensor:
            attended = self.self_attention(hidden_states, is_first_microbatch=is_first_microbatch)
            hidden = hidden_states + attended
            return hidden + self.layernorm_mlp(hidden, is_first_microbatch=is_first_microbatch)

    return TransformerLayer
