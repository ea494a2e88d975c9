"""What a head is: its weights, the dtype it computes in, and whether it may be computed for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.nn.modules import module as torch_module

LogitsPrecision = Literal["fp32", "bf16x3", "bf16"]
PRECISIONS = ("fp32", "bf16x3", "bf16")
COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
NARROW_DTYPES = (torch.bfloat16, torch.float16)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def compute_dtype_of(lm_head: nn.Module) -> torch.dtype | None:
    """The dtype that a head computes in; None if it is quantized or has no weights.

    Example:
        >>> compute_dtype_of(nn.Linear(1, 1, dtype=torch.float16))
        torch.float16
    """
    # FSDP2 shows the stored dtype until the pre-forward hook has run.
    policy = fsdp_policy(lm_head)
    if policy is not None and policy.param_dtype is not None:
        return policy.param_dtype
    return stored_dtype_of(lm_head)


def stored_dtype_of(lm_head: nn.Module) -> torch.dtype | None:
    """The dtype that its weights are stored in; None if it is quantized or has no weights.

    Example:
        >>> stored_dtype_of(nn.Identity()) is None
        True
    """
    dtypes = [weight.dtype for weight in _weights(lm_head)]
    return dtypes[0] if dtypes and all(dtype in COMPUTE_DTYPES for dtype in dtypes) else None


def own_precision(lm_head: nn.Module) -> LogitsPrecision | None:
    """The precision in which a head, or what it wraps, makes its products of itself, as `LMHead`.

    Example:
        >>> own_precision(nn.Linear(1, 1)) is None
        True
    """
    linears = (part for part in lm_head.modules() if isinstance(part, nn.Linear))
    found: Iterator[Any] = (getattr(part, "precision", None) for part in linears)
    return next((one for one in found if isinstance(one, str) and one in PRECISIONS), None)


def fsdp_policy(lm_head: nn.Module) -> MixedPrecisionPolicy | None:
    """The mixed precision of a head that FSDP2 shards, or of what it shards inside of it."""
    sharded = next((part for part in lm_head.modules() if isinstance(part, FSDPModule)), None)
    return None if sharded is None else sharded._get_fsdp_state()._mp_policy


def tensors_of(lm_head: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Its parameters and buffers, by name."""
    yield from lm_head.named_parameters()
    yield from lm_head.named_buffers()


def is_plain_linear(lm_head: nn.Module) -> bool:
    """Whether calling it is nothing but the product of its input and its weight."""
    return (
        type(lm_head) is nn.Linear
        and "forward" not in lm_head.__dict__
        and not any(getattr(lm_head, hooks) for hooks in _HOOKS)
        and not torch_module._has_any_global_hook()
    )


def _weights(lm_head: nn.Module) -> list[Tensor]:
    # Its attribute comes last: a parametrized weight would be computed only to be asked.
    weight = lm_head._parameters.get("weight")
    if weight is not None:
        return [weight]
    held: list[Tensor] = [*lm_head.parameters()] or [*lm_head.buffers()]
    attribute = None if held else getattr(lm_head, "weight", None)
    return [attribute] if isinstance(attribute, Tensor) else held
