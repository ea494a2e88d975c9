"""Attention modules whose attention function is Transformer Engine's.

The function is seen by the module's own forward in the place of transformers' registry, which stays
as it is; masks are made as for sdpa.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from automodel_fn.convert._around import Around
from automodel_fn.convert._compiled import is_attention
from automodel_fn.convert._head_sizes import unfit_for_te
from automodel_fn.convert._overlay import names_in, with_globals
from automodel_fn.convert._parts import Part
from automodel_fn.convert._rules import Rule
from automodel_fn.convert._settings import Behaviour, Namespace
from automodel_fn.errors import ConfigError
from automodel_fn.te._attention import Cores, te_core
from automodel_fn.te._load import load_te_module

_CORES = "te_cores"
_REGISTRY = "ALL_ATTENTION_FUNCTIONS"
_NOT_TAKEN = ("s_aux", "softcap", "position_bias")


class _Registry:
    """Stands in for transformers' registry: whatever is asked for, it is one function."""

    def get_interface(self, attn_implementation: str, default: Callable[..., Any]) -> Any:
        return te_attention

    __getitem__ = get = get_interface


def te_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' attention functions compute, by `DotProductAttention`.

    Args:
        module: The attention module.
        query: `[B, N, S, D]`.
        key: `[B, K, S, D]`.
        value: `[B, K, S, V]`.
        attention_mask: Broadcastable to `[B, N, S, S]`: boolean, True where a query sees a key, or
            added to the products; None where the order of tokens says all.
        dropout: Part of the weights that are dropped.
        scaling: Of the products.
        is_causal: Whether later tokens are hidden; None asks the module.
        kwargs: What other functions take.

    Returns:
        `[B, S, N, V]`, and None for the weights.

    Raises:
        ConfigError: Something that Transformer Engine is not told here, as attention sinks.
    """
    wrong = [name for name in _NOT_TAKEN if kwargs.get(name) is not None]
    if wrong:
        raise ConfigError(f"attn='te' takes no {wrong[0]}; use attn='eager'.")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    q, k, v = (each.transpose(1, 2).contiguous() for each in (query, key, value))
    kind, hidden = "arbitrary", None
    if attention_mask is None:
        kind = "causal" if causal and q.shape[1] > 1 else "no_mask"
    else:
        is_seen = attention_mask.dtype == torch.bool
        hidden = ~attention_mask if is_seen else attention_mask < 0
    core = te_core(
        vars(module)[_CORES],
        q,
        k,
        v,
        dropout=dropout,
        scale=scaling,
        is_training=module.training,
    )
    found = core(q, k, v, attention_mask=hidden, attn_mask_type=kind, qkv_format="bshd")
    return found.view(*q.shape[:3], v.shape[-1]), None


def _namespace(below: type[Any], choice: str) -> Namespace:
    load_te_module()
    return {"forward": with_globals(below.forward, {_REGISTRY: _Registry()})}


def _state(module: nn.Module, choice: str) -> Mapping[str, Any]:
    return {_CORES: Cores()}


def _refusal(part: Part, around: Around) -> str:
    if "sinks" in names_in(part.own):
        return "Transformer Engine's attention is not told of its sinks"
    if getattr(part.module, "sliding_window", None) is not None:
        return "its sliding window comes as a mask, for which Transformer Engine has no fast kernel"
    owners = (each for each in around.above(part) if hasattr(each.own, "_supports_sdpa"))
    owner: Any = next(owners, None)
    if owner is not None and not owner.own._supports_sdpa:
        return f"{owner.class_name} of transformers does not support sdpa, whose masks it takes"
    return ""


def _unfit(part: Part, around: Around) -> str:
    return unfit_for_te(part.module)


TE_ATTENTION = Behaviour(_namespace, state=_state)
TE_ATTENTION_RULE = Rule(
    "te_attn",
    own="False",
    is_candidate=is_attention,
    refusal=_refusal,
    unfit=_unfit,
    instead="say attn='auto', or 'sdpa'",
    remark=", by attn='te'; its masks are those of sdpa",
)
