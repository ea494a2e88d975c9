"""Laws of the operations: each against its float64 oracle, within what its roundings can do."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from automodel_fn.ops._heads import LogitsPrecision
from automodel_fn.ops._logits import lm_head_logits
from automodel_fn.ops._rms_norm import WeightMultiply, rms_norm_fp32, rms_norm_reference
from automodel_fn.ops._rope import RopeConfig, rope_config
from automodel_fn.testing._facts import demand, fact_of, facts_of, values_differ, wrong_elements


def check_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, *, weight_multiply: WeightMultiply = "fp32"
) -> None:
    """Law: `rms_norm_fp32` is off by its roundings only, and gradients change no bit of it.

    Allowed is what correct rounding to the dtype of `x` makes of the float64 result, moved by the
    relative error that float32 arithmetic can add: H / 2 + 8 halves of its epsilon. Rows whose
    squares overflow float32 are not looked at.

    Args:
        x: `[..., H]`, as for `rms_norm_fp32`.
        weight: `[H]` or None.
        eps: At least 1e-30.
        weight_multiply: "fp32" or "input".

    Raises:
        AssertionError: It does not hold.

    Example:
        >>> check_rms_norm(torch.tensor([[3.0, -0.0]]).half(), torch.ones(2), 1e-6)
    """
    before = (fact_of(x), None if weight is None else fact_of(weight))
    with torch.no_grad():
        found = rms_norm_fp32(x, weight, eps, weight_multiply=weight_multiply)
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight)]
    assert leaves[0] is not None
    other = rms_norm_fp32(leaves[0], leaves[1], eps, weight_multiply=weight_multiply)
    demand(found.dtype == x.dtype, f"rms_norm_fp32 gives {found.dtype} for {x.dtype}")
    demand(found.shape == x.shape, f"rms_norm_fp32 gives {found.shape} for {x.shape}")
    wrong = wrong_elements(fact_of(other.detach()), fact_of(found))
    demand(not wrong, f"rms_norm_fp32 has other bits where gradients are wanted, at {wrong[:5]}")
    low, high = _allowed_norm(x, weight, eps, weight_multiply)
    squares = x.double().square().sum(-1, keepdim=True)
    overflows = (squares > torch.finfo(torch.float32).max) & (x.dtype != torch.float64)
    demand_between(f"rms_norm_fp32 ({weight_multiply!r})", found, low, high, overflows)
    for tensor, was in zip((x, weight), before, strict=True):
        is_kept = tensor is None or was is None or not wrong_elements(fact_of(tensor), was)
        demand(is_kept, "rms_norm_fp32 changed what it was given")


def _allowed_norm(
    x: Tensor, weight: Tensor | None, eps: float, weight_multiply: str
) -> tuple[Tensor, Tensor]:
    compute = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32)
    error = (x.shape[-1] / 2 + 8) * compute.eps / 2
    late = weight if weight_multiply == "input" else None
    early = weight if late is None else None
    exact = rms_norm_reference(x, early, eps)
    # What underflows is lost in absolute terms, and grows with the weight.
    least = 2 * compute.smallest_normal * compute.eps
    slack = exact.abs() * error + least * (1 if early is None else 1 + early.double().abs())
    low, high = (exact - slack).to(x.dtype), (exact + slack).to(x.dtype)
    if late is None:
        return low, high
    ends = torch.stack([(late * low).to(x.dtype), (late * high).to(x.dtype)])
    return ends.amin(0), ends.amax(0)


def demand_between(
    name: str, found: Tensor, low: Tensor, high: Tensor, excused: Tensor | None = None
) -> None:
    """Demand that elements lie within bounds, or are NaN where a bound is.

    Example:
        >>> demand_between("one", torch.ones(2), torch.zeros(2), torch.ones(2))
    """
    is_right = ((found >= low) & (found <= high)) | (found.isnan() & (low.isnan() | high.isnan()))
    if excused is not None:
        is_right = is_right | excused
    for place in (~is_right).nonzero().tolist()[:1]:
        at = tuple(place)
        value, least, most = (tensor[at].item() for tensor in (found, low, high))
        raise AssertionError(f"{name} is {value} at {at}, allowed is {least} to {most}")


def check_lm_head_logits(
    lm_head: nn.Linear,
    hidden_states: Tensor,
    logits_to_keep: int | Tensor = 0,
    *,
    precision: LogitsPrecision | None = None,
) -> None:
    """Law: logits are those of the positions that were asked for, up to the order of the sum.

    Allowed is what correct rounding makes of the float64 result, moved by what a sum of H products
    can lose in the dtype of the logits, whatever its order. Kept logits are not compared with the
    full ones bit for bit: a matmul may sum fewer rows in another order. The gradient of the weight
    is looked at in the same way, and the head must be as it was.

    Args:
        lm_head: A plain Linear without hooks.
        hidden_states: `[B, S, H]` or `[T, H]`; bfloat16 with "bf16x3" and "bf16".
        logits_to_keep: As for `lm_head_logits`.
        precision: As for `lm_head_logits`.

    Raises:
        AssertionError: It does not hold.

    Example:
        >>> check_lm_head_logits(nn.Linear(2, 3), torch.ones(1, 4, 2), 2)
    """
    before = facts_of(lm_head)
    output = lm_head_logits(
        lm_head,
        hidden_states,
        logits_to_keep=logits_to_keep,
        precision=precision,
        output_hidden_states=True,
    )
    demand(
        output.hidden_states is hidden_states, "the hidden states are not those of every position"
    )
    dtype = torch.float32 if precision else lm_head.weight.dtype
    demand(output.logits.dtype == dtype, f"logits are {output.logits.dtype}, expected {dtype}")
    rows = _rows(logits_to_keep, hidden_states.shape[-2])
    hidden = torch.stack([hidden_states[..., row, :] for row in rows], -2) if rows else None
    kept = hidden_states[..., :0, :] if hidden is None else hidden
    stored = lm_head.weight.detach()
    weight = (stored.bfloat16() if precision == "bf16" else stored).double()
    kept = kept.detach().to(dtype).double()
    bias = dict(lm_head.named_parameters()).get("bias", torch.zeros(())).detach().double()
    exact, size = kept @ weight.T + bias, kept.abs() @ weight.abs().T + bias.abs()
    demand(output.logits.shape == exact.shape, f"logits have the shape {output.logits.shape}")
    # The second part is what products that underflow may lose.
    unit, least = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal
    slack = (kept.shape[-1] + 3) * unit * (size + 2 * least)
    demand_between("a logit", output.logits, (exact - slack).to(dtype), (exact + slack).to(dtype))
    complaints = list(values_differ(facts_of(lm_head), before))
    demand(not complaints, f"lm_head_logits changed the head: {complaints}")
    if lm_head.weight.requires_grad:
        _demand_gradient(lm_head, output.logits, kept, torch.finfo(dtype).eps)


def _demand_gradient(lm_head: nn.Linear, logits: Tensor, kept: Tensor, unit: float) -> None:
    demand(logits.requires_grad, "no gradient reaches the weight of the head")
    (found,) = torch.autograd.grad(logits.sum(), lm_head.weight)
    stored = lm_head.weight.dtype
    demand(found.dtype == stored, f"the gradient of the weight is {found.dtype}, not {stored}")
    flat = kept.reshape(-1, kept.shape[-1])
    slack = (len(flat) + 1) * unit * flat.abs().sum(0)
    low, high = ((flat.sum(0) + sign * slack).to(stored).expand_as(found) for sign in (-1, 1))
    demand_between("a gradient of the weight", found, low, high)


def _rows(logits_to_keep: int | Tensor, length: int) -> list[int]:
    if isinstance(logits_to_keep, Tensor):
        return [int(row) for row in logits_to_keep.tolist()]
    return list(range(length))[-logits_to_keep:]


def check_rope_config(parameters: Mapping[str, Any]) -> None:
    """Law: every spelling of one rotary embedding is read alike, and only read.

    Args:
        parameters: Flat `rope_parameters` with "rope_theta" and "rope_type".

    Raises:
        AssertionError: It does not hold.

    Example:
        >>> check_rope_config({"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0})
    """
    spellings = _spellings(parameters)
    expected = rope_config({"rope_parameters": dict(parameters)})
    demand(isinstance(expected, RopeConfig), f"flat parameters are read as {expected}")
    assert isinstance(expected, RopeConfig)
    stated = (parameters["rope_theta"], parameters["rope_type"])
    stated += (parameters.get("partial_rotary_factor", 1.0),)
    found = (expected.theta, expected.rope_type, expected.partial_rotary_factor)
    demand(found == stated, f"{stated} is read as {found}")
    for name, config in spellings.items():
        given = copy.deepcopy(config)
        for form in (config, SimpleNamespace(**config)):
            read = rope_config(form)
            is_right = read == (expected if name != "nested" else {"a": expected, "b": expected})
            demand(is_right, f"{name} is read as {read}, expected {expected}")
        demand(config == given, f"{name} was changed to {config}")
    again = rope_config({"rope_parameters": dict(expected.parameters)})
    demand(again == expected, f"what was read is read again as {again}, expected {expected}")
    demand(hash(again) == hash(expected), "equal configs have different hashes")
    without = attrs.evolve(expected, parameters={})
    demand(hash(without) == hash(expected), "the parameters change the hash")


def _spellings(parameters: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    rest = dict(parameters)
    theta, rope_type = rest.pop("rope_theta"), rest.pop("rope_type")
    part = {key: rest.pop(key) for key in ("partial_rotary_factor",) if key in rest}
    older = {"type": rope_type, **rest} if rest or rope_type != "default" else None
    shared = {"rope_theta": theta, **part}
    return {
        "rope_parameters": {"rope_parameters": dict(parameters)},
        "rope_parameters beside a theta": {
            "rope_parameters": {"type": rope_type, **rest},
            **shared,
        },
        "rope_scaling": {"rope_theta": theta, "rope_scaling": older, **part},
        "nested": {
            "rope_parameters": {
                "a": {"type": rope_type, **rest},
                **shared,
                "b": {"rope_type": rope_type, **rest},
            }
        },
    }
