"""Logits of any head, its products made as exact as was asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from automodel_fn.dtypes import dtype_name
from automodel_fn.errors import ConfigError
from automodel_fn.ops._heads import (
    NARROW_DTYPES,
    LogitsPrecision,
    fsdp_policy,
    is_plain_linear,
    stored_dtype_of,
)
from automodel_fn.ops._logits_product import logits_product
from automodel_fn.ops._weight_parts import WeightParts


def logits_by_products(
    lm_head: nn.Module,
    kept: Tensor,
    *,
    precision: LogitsPrecision,
    parts: WeightParts | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """What a head gives where its linear products are `logits_product`.

    A plain Linear is not called. Any other head is, so that its hooks run and FSDP2 gathers its
    weight; every `torch.nn.functional.linear` in it is made in the precision that was asked for.

    Args:
        lm_head: Not quantized.
        kept: `[B, S, H]` or `[T, H]`, bfloat16.
        precision: "bf16x3" or "bf16".
        parts: Of the weight of a plain Linear, or None.
        out_dtype: Of the logits.

    Raises:
        ConfigError: An argument is not as described, FSDP2 casts what comes in or goes out, or
            there is no such product in a head that is called.
    """
    _demand_head(lm_head, precision)
    if is_plain_linear(lm_head):
        weight, bias = lm_head._parameters["weight"], lm_head._parameters["bias"]
        assert weight is not None, "a Linear without a weight"
        return logits_product(
            kept, weight, bias, precision=precision, parts=parts, out_dtype=out_dtype
        )
    if parts is not None:
        raise ConfigError(
            f"weight_parts needs a plain nn.Linear without hooks, and lm_head is a "
            f"{type(lm_head).__name__}; leave it out, or make an LMHead, which keeps its own."
        )
    seen: list[torch.Size] = []
    with _Linears(precision, seen):
        logits = lm_head(kept)
    if not seen:
        raise ConfigError(
            f"precision={precision!r} has no part in what lm_head, a {type(lm_head).__name__}, "
            "computes: it makes no product by torch.nn.functional.linear; use precision=None, or "
            "a head that does."
        )
    return logits.to(out_dtype)


class _Linears(TorchFunctionMode):
    """Inside of it, linear products are made in a precision; `seen` gets their shapes."""

    def __init__(self, precision: LogitsPrecision, seen: list[torch.Size]) -> None:
        super().__init__()
        self._precision: LogitsPrecision = precision
        self._seen = seen

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is functional.linear:
            found = _linear(*args, **(kwargs or {}), precision=self._precision)
            self._seen.append(found.shape)
            return found
        return func(*args, **(kwargs or {}))


def _linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, precision: LogitsPrecision
) -> Tensor:
    return logits_product(input, weight, bias, precision=precision)


def _demand_head(lm_head: nn.Module, precision: LogitsPrecision) -> None:
    stored, policy = stored_dtype_of(lm_head), fsdp_policy(lm_head)
    if stored not in (torch.float32, *NARROW_DTYPES):
        found = "none of one such dtype" if stored is None else dtype_name(stored)
        raise ConfigError(
            f"precision={precision!r} needs weights of fp32, fp16 or bf16, found {found}; "
            "use precision=None or 'fp32'."
        )
    if policy is None:
        return
    casts_input = policy.cast_forward_inputs and policy.param_dtype not in (None, torch.bfloat16)
    loses_bits = precision == "bf16x3" and policy.param_dtype in NARROW_DTYPES
    is_narrowed = loses_bits and policy.param_dtype != stored
    if casts_input or is_narrowed or policy.output_dtype in NARROW_DTYPES:
        raise ConfigError(
            f"precision={precision!r} needs a head that gets bf16 hidden states and its weight as "
            f"it is stored, and FSDP2's policy of this one is {policy}; shard it by itself: "
            "fully_shard(lm_head, mp_policy=MixedPrecisionPolicy())."
        )
