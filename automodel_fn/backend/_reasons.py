"""Why each field of a backend runs as it does, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from automodel_fn.backend._availability import Availability
from automodel_fn.backend._fp8 import TEFp8Config
from automodel_fn.backend._rules import AUTO, PREFERRED, RUNNABLE, Values, broken

FUSED_ROPE = (
    "fused rotary embeddings are computed in float32 and rounded once, where Hugging Face rounds "
    "every product: log-probabilities in bf16 differ slightly (NeMo Automodel #3027)"
)
FUSED_LOSS = (
    "the fused loss makes no logits: in training, where labels are given, output.logits is "
    "None; loss='torch' keeps them"
)
TE_IN_FLOAT32 = (
    "attention by Transformer Engine is of weights that are stored in float32: without autocast or "
    "mixed precision it has no fast kernel; cast the model, or use attn='sdpa'"
)
GMM_IN_BF16 = (
    "grouped_gemm multiplies in bf16 only, and experts are stored in another dtype: "
    "cast the model, use torch.autocast, or experts='torch_mm'"
)
_FLEX = ("deepep", "hybridep", "uccl_ep")
_FLEX_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "dispatcher_num_sms": _FLEX,
    "dispatcher_share_token_dispatcher": _FLEX,
    "dispatcher_async_dispatch": ("deepep", "uccl_ep"),
}


def backend_name(name: str, value: Any) -> str:
    """The name under which a field's value has its verdict.

    Example:
        >>> backend_name("attn", "te"), backend_name("te_fp8", TEFp8Config("block"))
        ('attn=te', 'te_fp8=block')
    """
    return f"{name}={value.kind if isinstance(value, TEFp8Config) else value}"


def reason_for(name: str, asked: Values, runs: Values, found: Availability) -> str:
    """Why a field runs as it does."""
    if asked[name] == AUTO:
        return _choice(name, runs, found)
    if name in RUNNABLE and runs[name] is not None:
        reason = f"as asked; it {found.verdict(backend_name(name, runs[name])).reason} here"
        return f"{reason}; {FUSED_ROPE}" if name == "rope_fusion" and runs[name] else reason
    if name == "lm_head_precision" and runs[name] == "bf16x3" and not found.devices:
        return "as asked; without a GPU it multiplies in float32"
    return _plain(name, runs)


def _choice(name: str, runs: Values, found: Availability) -> str:
    order = PREFERRED[name]
    names = ", ".join(map(str, order))
    skipped = order[: order.index(runs[name])]
    order_text = "fastest first, te for FP8 only" if name == "experts" else "fastest first"
    reason = f"auto: the first of {names} that fits ({order_text})"
    why = [f"not {value}: {_why_not(name, value, runs, found)}" for value in skipped]
    if name == "rope_fusion" and runs[name]:
        why.append(FUSED_ROPE)
    return "; ".join([reason, *why])


def _why_not(name: str, value: Any, runs: Values, found: Availability) -> str:
    verdict = found.verdict(backend_name(name, value))
    if not verdict.can_run:
        return verdict.reason
    rules = broken({**runs, name: value})
    return rules[0].text if rules else "it does not go with the rest"


def _plain(name: str, runs: Values) -> str:
    dispatchers = _FLEX_OPTIONS.get(name)
    if dispatchers and runs["dispatcher"] not in dispatchers:
        return f"not used with dispatcher={runs['dispatcher']!r}"
    if name == "fake_gate_noise" and not runs["fake_balanced_gate"]:
        return "not used: the router decides"
    if name == "gate_precision" and runs["fake_balanced_gate"]:
        return "not used: there is no router"
    if runs[name] is not None:
        return "as asked"
    return {
        "enable_deepep": "replaced by dispatcher and experts",
        "te_fp8": "no FP8",
        "lm_head_precision": "the head computes in the dtype of its weight",
        "gate_precision": "the gate projects in its input's dtype and scores in float32",
    }[name]


def notes_for(runs: Values, found: Availability) -> Iterator[str]:
    """Remarks on what runs, in a fixed order."""
    if runs["rope_fusion"]:
        yield FUSED_ROPE
    if runs["loss"] == "fused":
        yield FUSED_LOSS
    if runs["te_fp8"] is not None and runs["linear"] != "te":
        yield "te_fp8 acts on the experts only: linear layers are not Transformer Engine's"
    if runs["te_fp8"] is not None and runs["experts"] != "te":
        yield "te_fp8 does not act on experts, if there are any: for that set experts='te'"
    if runs["experts"] in ("te", "gmm") and runs["dispatcher"] == "torch":
        yield (
            f"experts={runs['experts']!r} with dispatcher='torch' runs as asked, since grouped "
            "experts need no dispatcher: no tokens go to other ranks, so each rank has to have all "
            "experts"
        )
    if runs["dispatcher"] == "hybridep":
        yield (
            "dispatcher='hybridep' needs a deep_ep that was built from its hybrid-ep branch; "
            "whether this one was cannot be seen without importing it"
        )
    if runs["fake_balanced_gate"]:
        yield "fake_balanced_gate=True ignores the router: for benchmarks, not for training"
    if runs["enable_fsdp_optimizations"] and found.world_size == 1:
        yield "enable_fsdp_optimizations=True: one rank has no gradients to hold back"
    capabilities = {device.capability for device in found.devices}
    if len(capabilities) > 1:
        yield "the GPUs differ in compute capability: what one of them can run counts as runnable"
