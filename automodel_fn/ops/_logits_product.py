"""The product of hidden states and the weight of a head, with gradients, as exact as asked for.

Shapes: T is tokens, H the hidden dimension, V the vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import attrs
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional

from automodel_fn.dtypes import dtype_name
from automodel_fn.errors import ConfigError, itemized
from automodel_fn.ops._autocast import without_autocast
from automodel_fn.ops._choice import is_exporting
from automodel_fn.ops._heads import LogitsPrecision
from automodel_fn.ops._logits_operator import logits_operator
from automodel_fn.ops._logits_sharded import product_of_shards
from automodel_fn.ops._split import num_parts_of
from automodel_fn.ops._weight_parts import WeightParts, weight_parts


@attrs.frozen
class LogitsPath:
    """How logits are made of given tensors, and why.

    Args:
        name: "bf16" (products of bfloat16 operands, or of the parts of the weight, added in
            float32) or "fp32" (products of float32).
        reason: Why so, such as "hidden_states is on cpu".

    Example:
        >>> LogitsPath("fp32", reason="hidden_states is on cpu").name
        'fp32'
    """

    name: Literal["bf16", "fp32"]
    reason: str = attrs.field(kw_only=True)


def logits_path(
    hidden_states: Tensor,
    weight: Tensor | WeightParts,
    *,
    precision: LogitsPrecision,
) -> LogitsPath:
    """How `lm_head_logits` makes logits in a precision. Splits a weight that is not yet split.

    Args:
        hidden_states: `[B, S, H]` or `[T, H]`.
        weight: `[V, H]`, or its parts.
        precision: As for `lm_head_logits`.

    Example:
        >>> logits_path(torch.ones(1, 2).bfloat16(), torch.ones(3, 2), precision="bf16x3")
        LogitsPath(name='fp32', reason='hidden_states is on cpu')
    """
    if precision != "bf16x3":
        return LogitsPath(precision, reason=f"precision={precision!r}")
    if not hidden_states.is_cuda:
        return LogitsPath("fp32", reason=f"hidden_states is on {hidden_states.device.type}")
    parts = weight if isinstance(weight, WeightParts) else weight_parts(weight)
    if not _takes_parts(hidden_states, parts):
        return LogitsPath("fp32", reason="bf16 parts do not hold every number of the weight")
    return LogitsPath("bf16", reason="bf16 parts hold every number of the weight")


def _takes_parts(hidden: Tensor, parts: WeightParts) -> bool:
    # Compilers cannot trace how a frozen class is made, such as LogitsPath.
    return hidden.is_cuda and parts.is_exact


def logits_product(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    precision: LogitsPrecision,
    parts: WeightParts | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`hidden @ weight.T + bias`, made in float32 and rounded once.

    Args:
        hidden: `[..., H]`, bfloat16; with "fp32" of any dtype.
        weight: `[V, H]`, float32, float16 or bfloat16.
        bias: `[V]`, or None.
        precision: As for `lm_head_logits`.
        parts: Of the weight as it is now; None splits some rows at a time, and waits for the device
            once to know that this was exact.
        out_dtype: Of the result.

    Returns:
        `[..., V]`.

    Raises:
        ConfigError: An argument is not as described.
    """
    if isinstance(weight, DTensor) or isinstance(hidden, DTensor):
        options = {"precision": precision, "parts": parts, "out_dtype": out_dtype}
        return product_of_shards(hidden, weight, bias, partial(logits_product, **options))
    _demand_fitting(hidden, weight, precision, parts)
    if is_exporting() or _is_transformed(hidden, weight):
        return _product_by_torch(hidden, weight, bias, precision).to(out_dtype)
    mode, stacked = precision, None
    if precision == "bf16":
        stacked = None if parts is None else parts.high
    elif precision == "bf16x3" and parts is not None:
        mode = "parts" if _takes_parts(hidden, parts) else "fp32"
        stacked = parts.stacked if mode == "parts" else None
    elif precision == "bf16x3":
        mode = "split" if hidden.is_cuda else "fp32"
    logits, _ = logits_operator(hidden, weight, bias, stacked, mode, out_dtype)
    return logits


def _is_transformed(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False  # what asks cannot be traced
    native: Any = torch._C
    is_wrapped = native._functorch.is_functorch_wrapped_tensor
    return any(is_wrapped(tensor) for tensor in tensors)


def _product_by_torch(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, precision: LogitsPrecision
) -> Tensor:
    """In float32, by operators that `torch.export` and the transforms of `torch.func` know."""
    factor = weight.to(torch.bfloat16) if precision == "bf16" else weight
    wide_bias = None if bias is None else bias.float()
    with without_autocast(hidden):
        return functional.linear(hidden.float(), factor.float(), wide_bias)


def _demand_fitting(
    hidden: Tensor, weight: Tensor, precision: LogitsPrecision, parts: WeightParts | None
) -> None:
    lines: list[str] = []
    if precision != "fp32" and hidden.dtype != torch.bfloat16:
        lines.append(
            f"hidden_states has the dtype {dtype_name(hidden.dtype)}; precision={precision!r} "
            "takes bf16: cast them, or use precision='fp32' (FSDP2 casts what comes in to "
            "param_dtype, unless cast_forward_inputs=False)"
        )
    if num_parts_of(weight.dtype) is None:
        found = dtype_name(weight.dtype)
        lines.append(f"weight has the dtype {found}; it must be fp32, fp16 or bf16")
    if hidden.shape[-1] != weight.shape[-1]:
        sizes = f"{hidden.shape[-1]} and {weight.shape[-1]}"
        lines.append(f"hidden_states and weight have the hidden sizes {sizes}; they must be equal")
    if parts is not None:
        shape = (weight.shape[0], parts.num_parts * weight.shape[1])
        found, device = tuple(parts.stacked.shape), parts.stacked.device
        if found != shape or device != weight.device:
            lines.append(
                f"weight_parts is {found} on {device}; for this weight it must be {shape} on "
                f"{weight.device}, as weight_parts(weight) makes it"
            )
    if lines:
        raise ConfigError(itemized("logits cannot be computed:", lines))
