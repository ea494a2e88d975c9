"""The models of the benchmark "train-step", made from a case on its device, in bf16."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from automodel_fn.bench._spec import FULL, QUICK, Case

_GIB = 2**30
_LLAMA_8B: dict[str, int] = {
    "layers": 4,
    "hidden": 4096,
    "ffn": 14336,
    "heads": 32,
    "kv_heads": 8,
    "head_size": 128,
    "vocabulary": 128256,
    "rope_theta": 500_000,
    "experts": 0,
    "tokens": 4096,
}
_QWEN_30B: dict[str, int] = {
    "layers": 2,
    "hidden": 2048,
    "ffn": 768,
    "heads": 32,
    "kv_heads": 4,
    "head_size": 128,
    "vocabulary": 151936,
    "rope_theta": 1_000_000,
    "experts": 128,
    "experts_a_token": 8,
    "tokens": 4096,
}
_SMALL: dict[str, int] = {
    "layers": 2,
    "hidden": 256,
    "ffn": 512,
    "heads": 4,
    "kv_heads": 2,
    "head_size": 64,
    "vocabulary": 8192,
    "tokens": 256,
}
_TINY = {**_SMALL, "hidden": 128, "ffn": 128, "vocabulary": 1024, "tokens": 64}
_FEW_EXPERTS: dict[str, int] = {"experts": 8, "experts_a_token": 2}


def _case(
    name: str,
    device: str,
    sizes: dict[str, int],
    *,
    timed: int = 0,
    losses: int = 0,
    microbatches: int = 4,
    gib: int = 32,
    group: str = FULL,
) -> Case:
    parts = (
        f"{sizes['experts']} experts of {sizes['ffn']:,}, {sizes['experts_a_token']} a token"
        if sizes["experts"]
        else f"ffn {sizes['ffn']:,}"
    )
    done = [f"{timed} timed steps after 3"] * bool(timed) + [f"{losses} losses"] * bool(losses)
    return Case(
        name,
        device=device,
        description=f"{sizes['layers']} layers, hidden {sizes['hidden']:,}, {parts}, "
        f"{sizes['heads']}/{sizes['kv_heads']} heads of {sizes['head_size']}, "
        f"vocabulary {sizes['vocabulary']:,}; "
        f"{microbatches} microbatches of 1 x {sizes['tokens']:,} tokens; {', '.join(done)}",
        parameters={
            **sizes,
            "microbatches": microbatches,
            "timed_steps": timed,
            "loss_steps": losses,
        },
        needed_bytes=gib * _GIB,
        group=group,
    )


def _small(prefix: str, device: str, sizes: dict[str, int], **more: Any) -> tuple[Case, Case]:
    llama, mixture = {**_LLAMA_8B, **sizes}, {**_QWEN_30B, **sizes, **_FEW_EXPERTS}
    return (
        _case(f"{prefix}llama", device, llama, gib=2, **more),
        _case(f"{prefix}moe", device, mixture, gib=2, **more),
    )


CASES = (
    _case("llama", "cuda", _LLAMA_8B, timed=5),
    _case("llama-loss", "cuda", _LLAMA_8B, losses=50),
    _case("moe", "cuda", _QWEN_30B, timed=5),
    _case("moe-loss", "cuda", _QWEN_30B, losses=50),
    *_small("quick-", "cuda", _SMALL, timed=3, losses=5, group=QUICK),
    *_small("cpu-", "cpu", _SMALL, timed=5, losses=50),
    *_small("quick-cpu-", "cpu", _TINY, timed=2, losses=5, microbatches=2, group=QUICK),
)


def is_mixture(case: Case) -> bool:
    """Whether the model of a case has experts."""
    return case.parameter("experts") > 0


def config_of(case: Case) -> Any:
    """The config of transformers for a case: Llama's, or Qwen3's mixture of experts."""
    from transformers import LlamaConfig, Qwen3MoeConfig

    common: dict[str, Any] = {
        "num_hidden_layers": case.parameter("layers"),
        "hidden_size": case.parameter("hidden"),
        "num_attention_heads": case.parameter("heads"),
        "num_key_value_heads": case.parameter("kv_heads"),
        "head_dim": case.parameter("head_size"),
        "vocab_size": case.parameter("vocabulary"),
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "use_cache": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(case.parameter("rope_theta")),
        },
    }
    if not is_mixture(case):
        return LlamaConfig(**common, intermediate_size=case.parameter("ffn"), rms_norm_eps=1e-5)
    return Qwen3MoeConfig(
        **common,
        moe_intermediate_size=case.parameter("ffn"),
        num_experts=case.parameter("experts"),
        num_experts_per_tok=case.parameter("experts_a_token"),
        norm_topk_prob=True,
        rms_norm_eps=1e-6,
    )


def built_model(case: Case) -> nn.Module:
    """The model of a case as transformers has it, in bf16 and with weights that its seed gives.

    Attention is sdpa; the products of experts are grouped.
    """
    from transformers import LlamaForCausalLM, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    given: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    with torch.device(case.device):
        if is_mixture(case):
            return Qwen3MoeForCausalLM._from_config(  # pyright: ignore[reportPrivateUsage]
                config_of(case), experts_implementation="grouped_mm", **given
            )
        return LlamaForCausalLM._from_config(config_of(case), **given)  # pyright: ignore[reportPrivateUsage]
