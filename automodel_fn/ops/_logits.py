"""From the last hidden states to logits: which positions, in which precision, in which shape.

Shapes: `[B, S, H]` is batch, sequence, hidden; `[T, H]` is packed (THD); V is the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.func import functional_call
from torch.nn import functional
from torch.nn.modules import module as torch_module
from torch.utils import _pytree

from automodel_fn.dtypes import dtype_name, parse_dtype
from automodel_fn.errors import ConfigError
from automodel_fn.ops._kept_positions import kept_positions

_COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_NARROW = (torch.bfloat16, torch.float16)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@attrs.frozen(eq=False)
class LMHeadOutput:
    """What `lm_head_logits` returns. A pytree, so that FSDP2 and checkpointing see its tensors.

    Args:
        logits: `[B, S, V]` or `[T, V]`; the hidden states where there is no head.
        hidden_states: Those of every position, where they were asked for.

    Example:
        >>> LMHeadOutput(torch.ones(1, 2)).hidden_states is None
        True
    """

    logits: Tensor
    hidden_states: Tensor | None

    def __init__(self, logits: Tensor, hidden_states: Tensor | None = None) -> None:
        # torch.compile cannot trace the one that attrs makes for a frozen class.
        object.__setattr__(self, "logits", logits)
        object.__setattr__(self, "hidden_states", hidden_states)


_pytree.register_pytree_node(
    LMHeadOutput,
    lambda output: ([output.logits, output.hidden_states], None),
    lambda children, _: LMHeadOutput(*children),
    serialized_type_name="automodel_fn.LMHeadOutput",
)


def lm_head_logits(
    lm_head: nn.Module | None,
    hidden_states: Tensor,
    *,
    logits_to_keep: int | Tensor = 0,
    is_thd: bool = False,
    precision: Literal["fp32"] | None = None,
    logits_dtype: torch.dtype | str | None = None,
    output_hidden_states: bool = False,
) -> LMHeadOutput:
    """Project hidden states through the head of a language model.

    Does not change the head: with precision="fp32" a narrower weight, which may be tied to the
    embedding, is cast for this call only, and its gradient comes in its own dtype. float32 products
    are made under autocast too; whether a GPU makes them in TF32 is torch's own setting.

    Args:
        lm_head: The head; None on a pipeline stage that has none: the hidden states pass through as
            logits, of every position and in their own dtype.
        hidden_states: `[B, S, H]` or `[T, H]`.
        logits_to_keep: 0 for every position, which slices nothing; a positive int for that many
            last ones; or a 1-D integer tensor of positions, which has to be right (the values are
            looked at on the CPU only, since on a GPU that would wait for it).
        is_thd: The input is packed: a batch dimension of 1 is put before what is `[T, ...]`.
        precision: None computes in the dtype of the head: that of an FSDP2 head's mixed precision,
            else that of its weight; a head with quantized weights is given its input as it is.
            "fp32" computes in float32 whatever is stored.
        logits_dtype: What the logits are rounded to, once; None leaves them as computed.
        output_hidden_states: Return the hidden states as well, those of every position.

    Raises:
        ConfigError: An argument is not as described; the head is quantized, or is sharded by FSDP2
            to compute in less, and precision is "fp32".

    Source:
        Replaces `compute_lm_head_logits` (NeMo Automodel).

    Example:
        >>> head = nn.Linear(4, 10, dtype=torch.bfloat16)
        >>> output = lm_head_logits(head, torch.ones(1, 6, 4), logits_to_keep=2, precision="fp32")
        >>> output.logits.shape, output.logits.dtype
        (torch.Size([1, 2, 10]), torch.float32)
    """
    out_dtype = _demand_options(precision, logits_dtype)
    logits = hidden_states
    if lm_head is not None:
        kept = kept_positions(hidden_states, logits_to_keep)
        logits = _in_fp32(lm_head, kept) if precision else _in_its_dtype(lm_head, kept)
        logits = logits if out_dtype is None else logits.to(out_dtype)
    hidden = _with_batch(hidden_states, is_thd) if output_hidden_states else None
    return LMHeadOutput(_with_batch(logits, is_thd), hidden)


def compute_dtype_of(lm_head: nn.Module) -> torch.dtype | None:
    """The dtype that a head computes in; None if it is quantized or has no weights.

    Example:
        >>> compute_dtype_of(nn.Linear(1, 1, dtype=torch.float16))
        torch.float16
    """
    # FSDP2 shows the stored dtype until the pre-forward hook has run.
    policy = _fsdp_policy(lm_head)
    if policy is not None and policy.param_dtype is not None:
        return policy.param_dtype
    dtypes = [weight.dtype for weight in _weights(lm_head)]
    return dtypes[0] if dtypes and all(dtype in _COMPUTE_DTYPES for dtype in dtypes) else None


def _weights(lm_head: nn.Module) -> list[Tensor]:
    # Its attribute comes last: a parametrized weight would be computed only to be asked.
    weight = lm_head._parameters.get("weight")
    if weight is not None:
        return [weight]
    held: list[Tensor] = [*lm_head.parameters()] or [*lm_head.buffers()]
    attribute = None if held else getattr(lm_head, "weight", None)
    return [attribute] if isinstance(attribute, Tensor) else held


def _demand_options(precision: object, logits_dtype: Any) -> torch.dtype | None:
    if precision not in (None, "fp32"):
        raise ConfigError(f"precision={precision!r} must be None or 'fp32'.")
    if logits_dtype is None:
        return None
    dtype = parse_dtype(logits_dtype)
    if dtype not in _COMPUTE_DTYPES:
        raise ConfigError(
            f"logits_dtype={dtype_name(dtype)} is no dtype for logits; "
            "expected bf16, fp16, fp32 or float64."
        )
    return dtype


def _with_batch(tensor: Tensor, is_thd: bool) -> Tensor:
    return tensor.unsqueeze(0) if is_thd and tensor.dim() == 2 else tensor


def _fsdp_policy(lm_head: nn.Module) -> MixedPrecisionPolicy | None:
    sharded = next((part for part in lm_head.modules() if isinstance(part, FSDPModule)), None)
    return None if sharded is None else sharded._get_fsdp_state()._mp_policy


def _in_its_dtype(lm_head: nn.Module, kept: Tensor) -> Tensor:
    dtype = compute_dtype_of(lm_head)
    return lm_head(kept if dtype is None else kept.to(dtype))


def _in_fp32(lm_head: nn.Module, kept: Tensor) -> Tensor:
    own = compute_dtype_of(lm_head)
    policy = _fsdp_policy(lm_head)
    if policy is not None and (own in _NARROW or policy.output_dtype in _NARROW):
        raise ConfigError(
            f"precision='fp32' needs a head that computes in float32, but FSDP2 makes this one "
            f"compute in {own} and return {policy.output_dtype or own}; shard it by itself: "
            "fully_shard(lm_head, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))."
        )
    tensors = dict(_tensors_of(lm_head))
    if own is None and tensors:
        found = ", ".join(sorted({dtype_name(tensor.dtype) for tensor in tensors.values()}))
        raise ConfigError(
            f"precision='fp32' needs weights of a plain floating-point dtype, found {found}; "
            "use precision=None, or dequantize the head."
        )
    dtype = torch.float64 if own == torch.float64 else torch.float32
    with _without_autocast(kept):
        wide = kept.to(dtype)
        if policy is not None or all(tensor.dtype not in _NARROW for tensor in tensors.values()):
            return lm_head(wide)
        copies = {
            name: tensor.to(dtype) if tensor.dtype in _NARROW else tensor
            for name, tensor in tensors.items()
        }
        if _is_plain_linear(lm_head):
            return functional.linear(wide, copies["weight"], copies.get("bias"))
        return functional_call(lm_head, copies, (wide,))


def _tensors_of(lm_head: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from lm_head.named_parameters()
    yield from lm_head.named_buffers()


def _is_plain_linear(lm_head: nn.Module) -> bool:
    return (
        type(lm_head) is nn.Linear
        and "forward" not in lm_head.__dict__
        and not any(getattr(lm_head, hooks) for hooks in _HOOKS)
        and not torch_module._has_any_global_hook()
    )


def _without_autocast(tensor: Tensor) -> Any:
    device = tensor.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
