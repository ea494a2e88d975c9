"""Transformer Engine's attention, made for the sizes that come in."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from automodel_fn.te._load import load_te_module


class Cores(dict[Any, Any]):
    """The modules made so far, by sizes; a copy or pickle has none."""

    def __reduce__(self) -> tuple[type[Cores], tuple[()]]:
        return Cores, ()


def te_core(
    cores: Cores,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout: float,
    scale: float | None,
    is_training: bool,
) -> Any:
    """The `DotProductAttention` for these sizes, in the mode asked for; made once.

    Args:
        cores: Those made so far; a new one is added.
        q: `[B, S, N, D]`.
        k: `[B, S, K, D]`.
        v: `[B, S, K, V]`.
        dropout: Part of the weights that are dropped in training.
        scale: Of the products; None is `D ** -0.5`.
        is_training: Whether it drops any.

    Raises:
        BackendUnavailableError: Transformer Engine cannot be imported here.
    """
    sizes = (q.shape[2], k.shape[2], q.shape[-1], v.shape[-1], dropout, scale)
    if sizes not in cores:
        cores[sizes] = load_te_module().DotProductAttention(
            num_attention_heads=q.shape[2],
            kv_channels=(q.shape[-1], v.shape[-1]),
            num_gqa_groups=k.shape[2],
            attention_dropout=dropout,
            qkv_format="bshd",
            softmax_scale=scale,
        )
    return cores[sizes].train(is_training)
