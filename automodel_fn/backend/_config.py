"""Which backend a model is to use: an immutable value, which is checked when it is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import attrs
import torch

from automodel_fn.backend._checks import complaint, to_dtype, to_float, to_fp8
from automodel_fn.backend._fp8 import TEFp8Config
from automodel_fn.backend._rules import (
    Attention,
    Dispatcher,
    Experts,
    Fused,
    HeadPrecision,
    Linear,
    Norm,
    Swiglu,
    contradictions,
    value_text,
)
from automodel_fn.backend._text import (
    from_json,
    from_yaml,
    plain,
    structured,
    to_yaml,
)
from automodel_fn.errors import ConfigError, itemized


@attrs.frozen(kw_only=True)
class BackendConfig:
    """What is asked for: by which backend each part of a model is to run.

    A value: immutable, comparable, hashable (with a recipe object in `te_fp8`, if that is), and
    never rewritten, neither by itself nor by a model. Change one with `attrs.evolve`. Whether it
    can run is another question, which `resolve` answers for one machine; "auto" leaves the choice
    to that answer. Replaces `BackendConfig` (NeMo Automodel), whose fields it has.

    Args:
        attn: Attention: "auto", "te", "sdpa", "flex", "eager" or "tilelang".
        linear: Linear layers: "auto", "torch" or "te".
        rms_norm: RMSNorm: "torch", "torch_fp32" (all of it in float32) or "te".
        rope_fusion: Whether rotary embeddings are applied by one kernel: "auto", True or False. It
            computes in float32 and rounds once, while Hugging Face rounds every product, so
            log-probabilities in bf16 differ slightly between the two.
        async_masks: Whether causal masks are made without the host waiting for the device: "auto",
            True or False. transformers looks in each forward whether position ids start anew, as
            those of packed sequences do; where none are given they do not.
        swiglu: `silu(gate) * up` in MLPs and experts: "auto", "torch", "fused" (one kernel) or
            "recomputed" (that, and again in the backward, for which MLPs then keep less memory).
        loss: The loss behind the model's own `labels=`: "auto", "torch" or "fused", which makes no
            logits: in training they are None in the output.
        lm_head_precision: The products of the head, whose logits are then float32: "fp32", "bf16x3"
            (bfloat16 parts of the weight), "bf16", each as in `lm_head_logits`; None leaves the
            head as it is. The weight stays as it is stored.
        experts: Products of the experts: "auto", "torch" (one an expert), "torch_mm" (grouped),
            "torch_mm_mxfp8" (grouped, in MXFP8 by torchao), "gmm" or "te".
        dispatcher: How tokens reach their experts: "auto", "torch", "deepep", "hybridep" or
            "uccl_ep". "torch" experts need the first; "te" and "gmm" take it too, where each rank
            has all experts.
        dispatcher_num_sms: How many multiprocessors of the GPU dispatching may take.
        dispatcher_share_token_dispatcher: Whether layers share the buffers of one dispatcher.
        dispatcher_async_dispatch: Whether DeepEP and UCCL-EP dispatch without being waited for.
        enable_deepep: Only None; it was replaced by `dispatcher` and `experts`.
        fake_balanced_gate: Send tokens to experts evenly, without a router; for benchmarks.
        fake_gate_noise: How uneven the fake gate is, from 0 to 1; 0 without it.
        enable_hf_state_dict_adapter: Read and write checkpoints by Hugging Face's names.
        enable_fsdp_optimizations: Hold back gradient sync and resharding until they are needed.
        te_fp8: FP8 in Transformer Engine's modules: a TEFp8Config, the name of its recipe, a
            mapping of its fields, or None for off. It needs linear or experts to be "te".
        gate_precision: The dtype, or its name, in which the gate projects and scores; with None
            it projects in its input's dtype and scores in float32.
        compile_attn: Compile the attention module as a whole, which then must hold nothing of
            Transformer Engine or tilelang.

    Raises:
        ConfigError: Values that are not allowed, or that no machine could bring together; all of
            them are listed, and nothing is corrected silently.

    Example:
        >>> import attrs
        >>> backend = BackendConfig(attn="sdpa", gate_precision="fp32")
        >>> backend.gate_precision, attrs.evolve(backend, linear="torch").linear
        (torch.float32, 'torch')
        >>> BackendConfig(attn="spda", linear=True)
        Traceback (most recent call last):
        automodel_fn.errors.ConfigError: this BackendConfig cannot be made
          attn='spda' must be one of 'auto', 'te', 'sdpa', 'flex', 'eager', 'tilelang'; \
did you mean 'sdpa'?
          linear=True must be one of 'auto', 'torch', 'te'
    """

    attn: Attention = "auto"
    linear: Linear = "auto"
    rms_norm: Norm = "torch_fp32"
    rope_fusion: bool | Literal["auto"] = "auto"
    async_masks: bool | Literal["auto"] = "auto"
    swiglu: Swiglu = "auto"
    loss: Fused = "auto"
    lm_head_precision: HeadPrecision | None = None
    experts: Experts = "auto"
    dispatcher: Dispatcher = "auto"
    dispatcher_num_sms: int = 20
    dispatcher_share_token_dispatcher: bool = True
    dispatcher_async_dispatch: bool = False
    enable_deepep: None = None
    fake_balanced_gate: bool = False
    fake_gate_noise: float = attrs.field(default=0.0, converter=to_float)
    enable_hf_state_dict_adapter: bool = True
    enable_fsdp_optimizations: bool = False
    te_fp8: TEFp8Config | None = attrs.field(default=None, converter=to_fp8)
    gate_precision: torch.dtype | None = attrs.field(default=None, converter=to_dtype)
    compile_attn: bool = False

    def __attrs_post_init__(self) -> None:
        values = values_of(self)
        wrong = {name: text for name, value in values.items() if (text := complaint(name, value))}
        lines = [f"{name}={value_text(values[name])} {text}" for name, text in wrong.items()]
        # A rule about a wrong value would say the same thing twice.
        lines += contradictions(values, unjudged=wrong)
        if lines:
            raise ConfigError(itemized("this BackendConfig cannot be made", lines))

    def to_dict(self) -> dict[str, Any]:
        """The fields in order, as strings, numbers, booleans and None; by cattrs.

        Raises:
            ConfigError: FP8 by a recipe object, which has no name.
            BackendUnavailableError: cattrs is not installed: `pip install 'automodel_fn[config]'`.

        Example:
            >>> BackendConfig(te_fp8="block").to_dict()["te_fp8"]
            'block'
        """
        return plain(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BackendConfig:
        """The config of a mapping of fields, by cattrs; those that it lacks are the default's.

        Raises:
            ConfigError: Keys that no field has, each with the nearest one, and wrong values; all
                of them are listed.
            BackendUnavailableError: cattrs is not installed: `pip install 'automodel_fn[config]'`.

        Example:
            >>> BackendConfig.from_dict({"attn": "sdpa"}) == BackendConfig(attn="sdpa")
            True
        """
        return structured(data, cls)

    def to_json(self) -> str:
        """The config as JSON text."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> BackendConfig:
        """The config of a JSON text; see `from_dict`."""
        return cls.from_dict(from_json(text))

    def to_yaml(self) -> str:
        """The config as YAML text; needs PyYAML too."""
        return to_yaml(self.to_dict())

    @classmethod
    def from_yaml(cls, text: str) -> BackendConfig:
        """The config of a YAML text; see `from_dict`. Needs PyYAML too."""
        return cls.from_dict(from_yaml(text))


def values_of(config: BackendConfig) -> dict[str, Any]:
    """The fields of a config by name, in order.

    Example:
        >>> list(values_of(BackendConfig()))[:3]
        ['attn', 'linear', 'rms_norm']
    """
    return {each.name: getattr(config, each.name) for each in attrs.fields(BackendConfig)}
