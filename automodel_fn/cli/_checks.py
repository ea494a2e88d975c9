"""What a training run checks of itself: each a claim, a verdict, and the evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import nn

from automodel_fn.cast._audit import audit
from automodel_fn.cast._bits import same_bits
from automodel_fn.cast._entries import KEEP
from automodel_fn.cast._plan import CastPlan
from automodel_fn.cast._tensors import scan
from automodel_fn.step._context import StepContext

MIN_STEPS_FOR_LOSS = 20


@attrs.frozen
class Check:
    """One check of a run.

    Args:
        claim: What should be true.
        passed: Whether it is; None if it was not checked.
        evidence: What was looked at, or why it was not.
    """

    claim: str
    passed: bool | None = attrs.field(kw_only=True)
    evidence: str = attrs.field(kw_only=True)

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        return {True: "ok", False: "FAILED", None: "not checked"}[self.passed]


def pin_bits(model: nn.Module, plan: CastPlan) -> dict[str, torch.Tensor]:
    """What the plan's fp32 pins must be after the cast, computed one by one before it."""
    pinned = {entry.name for entry in plan.entries if entry.action == KEEP}
    return {
        item.names[0]: item.tensor.detach().to(torch.float32, copy=True)
        for item in scan(model).tensors
        if item.names[0] in pinned
    }


def check_pins_exact(model: nn.Module, expected: Mapping[str, torch.Tensor]) -> Check:
    """After the cast: every fp32 pin has every bit that it had."""
    held = {item.names[0]: item.tensor for item in scan(model).tensors}
    wrong = [name for name, bits in expected.items() if not same_bits(held[name].detach(), bits)]
    unprovable = sum(_fits(bits) for bits in expected.values())
    evidence = f"{len(expected)} pins compared as integers"
    if unprovable:
        evidence += f"; {unprovable} hold only values that bfloat16 can hold as well"
    return Check(
        "fp32 pins are bit-exact after the cast",
        passed=None if not expected else not wrong,
        evidence=f"changed: {_some(wrong)}" if wrong else evidence if expected else "no pins",
    )


def _fits(tensor: torch.Tensor) -> bool:
    return same_bits(tensor.to(torch.bfloat16).to(torch.float32), tensor)


def check_pins_fp32(model: nn.Module, plan: CastPlan) -> Check:
    """At the end: every fp32 pin is still float32."""
    held = {item.names[0]: item.tensor.dtype for item in scan(model).tensors}
    pinned = [entry.name for entry in plan.entries if entry.action == KEEP]
    wrong = [name for name in pinned if held.get(name) != torch.float32]
    return Check(
        "fp32 pins are still float32 at the end",
        passed=None if not pinned else not wrong,
        evidence=f"not float32: {_some(wrong)}" if wrong else f"{len(pinned)} pins",
    )


def check_dtypes(model: nn.Module, plan: CastPlan) -> Check:
    """Every tensor is as the plan says."""
    found = audit(model, plan)
    return Check(
        "every tensor is as planned",
        passed=not found,
        evidence=_some([str(f) for f in found]) if found else f"{len(plan.entries)} tensors",
    )


def check_steps(
    expected: Sequence[StepContext], seen: Sequence[Sequence[StepContext]], recomputes: int | None
) -> Check:
    """In every microbatch each forward, and each recompute, saw the step that it belongs to.

    Args:
        expected: The step of each microbatch.
        seen: What forwards read, by microbatch.
        recomputes: How many reads were in a recompute; None if nothing is recomputed.
    """
    pairs = list(zip(expected, seen, strict=True))
    wrong = [i for i, (step, reads) in enumerate(pairs) if not reads or set(reads) != {step}]
    evidence = f"{sum(map(len, seen))} reads in {len(expected)} microbatches"
    if recomputes is not None:
        evidence += f", {recomputes} of them in recomputes"
    if wrong:
        reads = sorted({str(step) for step in seen[wrong[0]]})
        evidence = f"microbatch {wrong[0] + 1}: expected {expected[wrong[0]]}, seen {_some(reads)}"
    elif recomputes == 0:
        evidence = "activation checkpointing is on, but nothing was recomputed"
    return Check(
        "forwards saw the step contexts of accumulate",
        passed=not wrong and recomputes != 0 if expected else None,
        evidence=evidence,
    )


def check_loss(before: float, after: float | None, steps: int) -> Check:
    """The loss on one fixed batch is lower at the end than at the start."""
    claim = "the loss on a fixed batch fell"
    if after is None or steps < MIN_STEPS_FOR_LOSS:
        return Check(claim, passed=None, evidence=f"{steps} steps, fewer than {MIN_STEPS_FOR_LOSS}")
    return Check(claim, passed=after < before, evidence=f"{before:.4f} -> {after:.4f}")


def check_saved(model: nn.Module, loaded: nn.Module) -> Check:
    """The saved model loads again, bit for bit."""
    ours, theirs = model.state_dict(), loaded.state_dict()
    wrong = [
        name
        for name, value in ours.items()
        if name not in theirs or not same_bits(value.float(), theirs[name].float())
    ]
    return Check(
        "the saved model loads again, bit for bit",
        passed=not wrong,
        evidence=f"differ: {_some(wrong)}" if wrong else f"{len(ours)} tensors",
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
