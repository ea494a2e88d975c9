"""Who makes a training step in the benchmark "train-step": ours and its peers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs
import torch
from torch import nn

from automodel_fn.backend._config import BackendConfig
from automodel_fn.backend._fp8 import TEFp8Config
from automodel_fn.bench._spec import Case
from automodel_fn.bench._train_step_models import built_model, config_of, is_mixture
from automodel_fn.convert._planner import backend_plan
from automodel_fn.plans import apply
from automodel_fn.step._ambient import step_context
from automodel_fn.step._context import StepContext
from automodel_fn.te._load import load_te_classes


def _no_scope(step: StepContext) -> AbstractContextManager[object]:
    return nullcontext()


@attrs.frozen
class Way:
    """A way to make a training step.

    Args:
        prepare: Makes the model of a case.
        scope: What a microbatch's forward and backward run in, given its step.
        load: Imports what it needs; done before any model runs, since Transformer Engine cannot be
            imported where PyTorch has loaded another cuDNN for an attention.
    """

    prepare: Callable[[Case], nn.Module]
    scope: Callable[[StepContext], AbstractContextManager[object]] = attrs.field(
        default=_no_scope, kw_only=True
    )
    load: Callable[[], object] = attrs.field(default=lambda: None, kw_only=True)


def our_backend(case: Case) -> BackendConfig:
    """The backend that ours asks for in bf16; a CPU computes experts one by one."""
    experts = "torch_mm" if case.device == "cuda" else "torch"
    return BackendConfig(
        attn="sdpa",
        linear="torch",
        rms_norm="torch_fp32",
        rope_fusion=True,
        async_masks=True,
        swiglu="fused" if is_mixture(case) else "recomputed",
        loss="fused",
        experts=experts if is_mixture(case) else "auto",
    )


def _converted(case: Case, backend: BackendConfig) -> nn.Module:
    model = built_model(case)
    apply(backend_plan(model, backend))
    return model


def _ours(case: Case) -> nn.Module:
    return _converted(case, our_backend(case))


def _ours_in_fp8(case: Case) -> nn.Module:
    return _converted(case, _in_te(our_backend(case)))


def _in_te(backend: BackendConfig) -> BackendConfig:
    # Its layers keep what they multiply in FP8, not in bf16, so that a product is not kept anyway.
    return attrs.evolve(backend, linear="te", te_fp8="current", swiglu="fused")


def _compiled(case: Case) -> nn.Module:
    model: Any = built_model(case)
    model.model.compile()
    return model


def _liger_package() -> Any:
    """The peer's module."""
    import liger_kernel.transformers as package  # pyright: ignore[reportMissingImports] - a peer

    return package


def _liger(case: Case) -> nn.Module:
    model = built_model(case)
    family = "qwen3_moe" if is_mixture(case) else "llama"
    getattr(_liger_package(), f"apply_liger_kernel_to_{family}")(model=model)
    return model


def _nemo_classes() -> tuple[Any, Any]:
    """The peer's class of a model, and its BackendConfig."""
    from nemo_automodel.components.models.common.utils import (  # pyright: ignore[reportMissingImports] - a peer
        BackendConfig,
    )
    from nemo_automodel.components.models.llama.model import (  # pyright: ignore[reportMissingImports] - a peer
        LlamaForCausalLM,
    )

    return LlamaForCausalLM, BackendConfig


def _nemo(case: Case) -> nn.Module:
    made, backend = _nemo_classes()
    config = config_of(case)
    config.dtype, config._attn_implementation = torch.bfloat16, "sdpa"
    torch.manual_seed(0)
    with torch.device(case.device):
        model = made(
            config,
            backend(attn="sdpa", linear="torch", rms_norm="torch_fp32", rope_fusion=False),
        )
    return model.to(torch.bfloat16)


def _te_linear(case: Case) -> nn.Module:
    model, linear = built_model(case), load_te_classes().linear
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            made: Any = linear(
                module.in_features,
                module.out_features,
                bias=False,
                params_dtype=torch.bfloat16,
                device=case.device,
            )
            with torch.no_grad():
                made.weight.copy_(module.weight)
            model.set_submodule(name, made)
    return model


def _in_fp8(step: StepContext) -> AbstractContextManager[object]:
    return TEFp8Config("current").autocast()


OURS = Way(_ours, scope=step_context)
OURS_FP8 = Way(_ours_in_fp8, scope=step_context, load=load_te_classes)
PLAIN = Way(built_model)
COMPILED = Way(_compiled)
LIGER = Way(_liger, load=_liger_package)
NEMO = Way(_nemo, load=_nemo_classes)
TE_LINEAR = Way(_te_linear, scope=_in_fp8, load=load_te_classes)
