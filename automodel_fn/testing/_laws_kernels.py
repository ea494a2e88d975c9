"""Laws of the operations that have kernels of this package, on whatever computes them here."""

from __future__ import annotations

import torch
from torch import Tensor

from automodel_fn.ops._rms_norm import WeightMultiply, rms_norm_fp32
from automodel_fn.ops._swiglu import swiglu, swiglu_reference
from automodel_fn.testing._facts import demand, fact_of, wrong_elements
from automodel_fn.testing._laws_ops import demand_between


def check_rms_norm_residual(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_multiply: WeightMultiply = "fp32",
) -> None:
    """Law: with a residual, `rms_norm_fp32` gives the bits that adding first gives.

    Args:
        x: `[..., H]`, as for `rms_norm_fp32`.
        residual: `[..., H]`.
        weight: `[H]` or None.
        eps: At least 1e-30.
        weight_multiply: "fp32" or "input".

    Raises:
        AssertionError: It does not hold.

    Example:
        >>> x = torch.tensor([[3.0, -0.0]]).half()
        >>> check_rms_norm_residual(x, x, torch.ones(2), 1e-6)
    """
    with torch.no_grad():
        y, total = rms_norm_fp32(x, weight, eps, weight_multiply=weight_multiply, residual=residual)
        expected = (x + residual).to(x.dtype)
        normed = rms_norm_fp32(expected, weight, eps, weight_multiply=weight_multiply)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, residual)]
    with_gradients = rms_norm_fp32(
        leaves[0], weight, eps, weight_multiply=weight_multiply, residual=leaves[1]
    )
    for name, found, right in (
        ("the sum", total, expected),
        ("the norm", y, normed),
        ("the norm with gradients", with_gradients[0], normed),
        ("the sum with gradients", with_gradients[1], expected),
    ):
        wrong = wrong_elements(fact_of(found.detach()), fact_of(right.detach()))
        demand(not wrong, f"rms_norm_fp32 with a residual: {name} has other bits, at {wrong[:5]}")


def check_rms_norm_scale(x: Tensor, eps: float, exponent: int) -> None:
    """Law: `x` times a power of 2 and `eps` times its square change no bit of the norm.

    As eps goes to 0, the norm therefore does not depend on the scale of `x`.

    Args:
        x: `[..., H]`; neither it nor its squares may overflow or underflow when scaled.
        eps: 0, or as large that it may be scaled as well.
        exponent: Of the power of 2.

    Raises:
        AssertionError: It does not hold.

    Example:
        >>> check_rms_norm_scale(torch.tensor([[3.0, -0.5]]), 1e-6, 5)
    """
    scaled = rms_norm_fp32(x * 2.0**exponent, None, eps * 4.0**exponent)
    wrong = wrong_elements(fact_of(scaled), fact_of(rms_norm_fp32(x, None, eps)))
    demand(not wrong, f"rms_norm_fp32 depends on the scale of x, at {wrong[:5]}")


def check_swiglu(gate: Tensor, up: Tensor) -> None:
    """Law: `swiglu` is off by its roundings only, and gradients change no bit of it.

    Allowed is what correct rounding makes of the float64 result, moved by 8 epsilons of what it is
    computed in.

    Args:
        gate: `[..., F]`, as for `swiglu`.
        up: `[..., F]`.

    Raises:
        AssertionError: It does not hold.

    Example:
        >>> check_swiglu(torch.tensor([3.0, -0.0]).half(), torch.ones(2).half())
    """
    before = (fact_of(gate), fact_of(up))
    with torch.no_grad():
        found = swiglu(gate, up)
    leaves = [tensor.detach().requires_grad_() for tensor in (gate, up)]
    wrong = wrong_elements(fact_of(swiglu(*leaves).detach()), fact_of(found))
    demand(not wrong, f"swiglu has other bits where gradients are wanted, at {wrong[:5]}")
    demand(found.dtype == gate.dtype, f"swiglu gives {found.dtype} for {gate.dtype}")
    compute = torch.finfo(torch.float64 if gate.dtype == torch.float64 else torch.float32)
    exact = swiglu_reference(gate, up)
    # Where the exponential overflows, the result is 0; it would be at most this much.
    slack = 8 * compute.eps * exact.abs() + 256 * compute.smallest_normal * (1 + up.double().abs())
    slack = slack.nan_to_num(posinf=0.0)
    demand_between("swiglu", found, (exact - slack).to(gate.dtype), (exact + slack).to(gate.dtype))
    for tensor, was in zip((gate, up), before, strict=True):
        demand(not wrong_elements(fact_of(tensor), was), "swiglu changed what it was given")
