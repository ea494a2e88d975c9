"""From the last hidden states to logits: which positions, in which precision, in which shape.

Shapes: `[B, S, H]` is batch, sequence, hidden; `[T, H]` is packed (THD); V is the vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from automodel_fn.dtypes import dtype_name, parse_dtype
from automodel_fn.errors import ConfigError
from automodel_fn.ops._autocast import without_autocast
from automodel_fn.ops._heads import (
    COMPUTE_DTYPES,
    NARROW_DTYPES,
    PRECISIONS,
    LogitsPrecision,
    compute_dtype_of,
    fsdp_policy,
    is_plain_linear,
    own_precision,
    tensors_of,
)
from automodel_fn.ops._kept_positions import kept_positions
from automodel_fn.ops._logits_by_products import logits_by_products
from automodel_fn.ops._weight_parts import WeightParts


class LMHeadOutput(NamedTuple):
    """What `lm_head_logits` returns. A tuple, because FSDP2 looks for tensors in no other classes.

    Args:
        logits: `[B, S, V]` or `[T, V]`; the hidden states where there is no head.
        hidden_states: Those of every position, where they were asked for.

    Example:
        >>> LMHeadOutput(torch.ones(1, 2)).hidden_states is None
        True
    """

    logits: Tensor
    hidden_states: Tensor | None = None


def lm_head_logits(
    lm_head: nn.Module | None,
    hidden_states: Tensor,
    *,
    logits_to_keep: int | Tensor = 0,
    is_thd: bool = False,
    precision: LogitsPrecision | None = None,
    weight_parts: WeightParts | None = None,
    logits_dtype: torch.dtype | str | None = None,
    output_hidden_states: bool = False,
) -> LMHeadOutput:
    """Project hidden states through the head of a language model.

    Does not change the head. With precision="fp32" a narrower weight, which may be tied to the
    embedding, is cast for this call only, and its gradient comes in its own dtype. float32 products
    are made under autocast too; whether a GPU makes them in TF32 is torch's own setting.

    With "bf16x3" bfloat16 hidden states meet bfloat16 parts of the weight that add up to it exactly
    (`weight_parts`), so that products are exact and their float32 sums are all that rounds: close
    to "fp32", in a fraction of its time. It multiplies a bfloat16 weight as it is. A weight that
    has no exact parts, and every weight on the CPU, is multiplied in float32 (`logits_path` says
    so, and why); so do `torch.export` and the transforms of `torch.func`. The gradient of a float32
    weight is a sum of three products, that of bfloat16 hidden states one of three that leaves out
    what is below 2**-16 of a term. Where float32 has an infinity, there may be a NaN.

    Args:
        lm_head: The head; None on a pipeline stage that has none: the hidden states pass through as
            logits, of every position and in their own dtype.
        hidden_states: `[B, S, H]` or `[T, H]`.
        logits_to_keep: 0 for every position, which slices nothing; a positive int for that many
            last ones; or a 1-D integer tensor of positions, which has to be right (the values are
            looked at on the CPU only, since on a GPU that would wait for it).
        is_thd: The input is packed: a batch dimension of 1 is put before what is `[T, ...]`.
        precision: None leaves it to the head: the dtype of an FSDP2 head's mixed precision, else
            that of its weight, or what an `LMHead` was made for; a head with quantized weights is
            given its input as it is. "fp32" computes in float32 whatever is stored. "bf16x3" is as
            above; "bf16" rounds the weight and the gradient of the logits to bfloat16. Both want
            bfloat16 hidden states, add in float32 and return float32.
        weight_parts: For "bf16x3", the parts of the weight of a plain Linear as it is now, made
            once for many calls. Without, a call splits it anew, some rows at a time, and waits for
            the device to know whether the parts are exact.
        logits_dtype: What the logits are rounded to, once; None leaves them as computed.
        output_hidden_states: Return the hidden states as well, those of every position.

    Raises:
        ConfigError: An argument is not as described; or a precision is asked for, and the head is
            quantized, is sharded by FSDP2 to compute in less, or makes no product by `F.linear`
            that could be made so.

    Source:
        Replaces `compute_lm_head_logits` (NeMo Automodel).

    Example:
        >>> head = nn.Linear(4, 10, dtype=torch.bfloat16)
        >>> output = lm_head_logits(head, torch.ones(1, 6, 4), logits_to_keep=2, precision="fp32")
        >>> output.logits.shape, output.logits.dtype
        (torch.Size([1, 2, 10]), torch.float32)
    """
    out_dtype = _demand_options(precision, weight_parts, logits_dtype)
    logits = hidden_states
    if lm_head is not None:
        kept = kept_positions(hidden_states, logits_to_keep)
        logits = _projected(lm_head, kept, precision, weight_parts, out_dtype)
        logits = logits if out_dtype is None else logits.to(out_dtype)
    hidden = _with_batch(hidden_states, is_thd) if output_hidden_states else None
    return LMHeadOutput(_with_batch(logits, is_thd), hidden)


def lm_head_logits_reference(
    lm_head: nn.Linear, hidden_states: Tensor, *, logits_to_keep: int | Tensor = 0
) -> Tensor:
    """What `lm_head_logits` approximates: the logits in float64, `[..., K, V]`.

    Args:
        lm_head: A plain Linear.
        hidden_states: `[..., S, H]`.
        logits_to_keep: As for `lm_head_logits`; K positions.

    Example:
        >>> lm_head_logits_reference(nn.Linear(4, 10), torch.ones(6, 4), logits_to_keep=2).shape
        torch.Size([2, 10])
    """
    is_last = isinstance(logits_to_keep, int)
    rows = slice(-logits_to_keep, None) if is_last else logits_to_keep
    bias: Any = lm_head.bias
    kept, wide = hidden_states[..., rows, :].double(), lm_head.weight.double()
    return functional.linear(kept, wide, None if bias is None else bias.double())


def _demand_options(precision: object, parts: object, logits_dtype: Any) -> torch.dtype | None:
    if precision is not None and precision not in PRECISIONS:
        raise ConfigError(f"precision={precision!r} must be None, 'fp32', 'bf16x3' or 'bf16'.")
    if parts is not None and (not isinstance(parts, WeightParts) or precision in (None, "fp32")):
        raise ConfigError(
            f"weight_parts={type(parts).__name__} with precision={precision!r} has no use; it is "
            "what weight_parts(lm_head.weight) gives, for precision='bf16x3' or 'bf16'."
        )
    if logits_dtype is None:
        return None
    dtype = parse_dtype(logits_dtype)
    if dtype not in COMPUTE_DTYPES:
        raise ConfigError(
            f"logits_dtype={dtype_name(dtype)} is no dtype for logits; "
            "expected bf16, fp16, fp32 or float64."
        )
    return dtype


def _with_batch(tensor: Tensor, is_thd: bool) -> Tensor:
    return tensor.unsqueeze(0) if is_thd and tensor.dim() == 2 else tensor


def _projected(
    lm_head: nn.Module,
    kept: Tensor,
    precision: LogitsPrecision | None,
    parts: WeightParts | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    own = own_precision(lm_head)
    if own is not None:
        if precision not in (None, own) or parts is not None:
            raise ConfigError(
                f"lm_head is a {type(lm_head).__name__} with a precision of its own, {own!r}, and "
                f"keeps its own parts; leave precision={precision!r} and weight_parts out."
            )
        return lm_head(kept)
    if precision is None:
        return _in_its_dtype(lm_head, kept)
    if precision == "fp32":
        return _in_fp32(lm_head, kept)
    dtype = out_dtype or torch.float32
    return logits_by_products(lm_head, kept, precision=precision, parts=parts, out_dtype=dtype)


def _in_its_dtype(lm_head: nn.Module, kept: Tensor) -> Tensor:
    dtype = compute_dtype_of(lm_head)
    return lm_head(kept if dtype is None else kept.to(dtype))


def _in_fp32(lm_head: nn.Module, kept: Tensor) -> Tensor:
    own = compute_dtype_of(lm_head)
    policy = fsdp_policy(lm_head)
    if policy is not None and (own in NARROW_DTYPES or policy.output_dtype in NARROW_DTYPES):
        raise ConfigError(
            f"precision='fp32' needs a head that computes in float32, but FSDP2 makes this one "
            f"compute in {own} and return {policy.output_dtype or own}; shard it by itself: "
            "fully_shard(lm_head, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))."
        )
    tensors = dict(tensors_of(lm_head))
    if own is None and tensors:
        found = ", ".join(sorted({dtype_name(tensor.dtype) for tensor in tensors.values()}))
        raise ConfigError(
            f"precision='fp32' needs weights of a plain floating-point dtype, found {found}; "
            "use precision=None, or dequantize the head."
        )
    dtype = torch.float64 if own == torch.float64 else torch.float32
    with without_autocast(kept):
        wide = kept.to(dtype)
        if policy is not None or all(
            tensor.dtype not in NARROW_DTYPES for tensor in tensors.values()
        ):
            return lm_head(wide)
        copies = {
            name: tensor.to(dtype) if tensor.dtype in NARROW_DTYPES else tensor
            for name, tensor in tensors.items()
        }
        if is_plain_linear(lm_head):
            return functional.linear(wide, copies["weight"], copies.get("bias"))
        return functional_call(lm_head, copies, (wide,))
