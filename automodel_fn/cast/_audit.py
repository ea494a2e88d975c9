"""Is a model as it was planned?"""

from __future__ import annotations

from operator import attrgetter

from torch import nn

from automodel_fn.cast._bits import checksum
from automodel_fn.cast._compare import Finding, findings
from automodel_fn.cast._plan import CastPlan
from automodel_fn.cast._report import CastReport
from automodel_fn.cast._rules import storage_groups
from automodel_fn.cast._tensors import ModelScan, scan
from automodel_fn.errors import ConfigError


def audit(
    model: nn.Module, plan: CastPlan | CastReport, *, bits: bool = False
) -> tuple[Finding, ...]:
    r"""Everything about a model that is not as planned; empty if all is. Reads only.

    Args:
        model: The model, after the cast, at any later time.
        plan: The plan that was applied, or the report of it.
        bits: Also compare every tensor's bits with the checksums of the report; after training, all
            that was trained differs.

    Returns:
        Findings: names, kinds, shapes, dtypes, trainability, missing and additional tensors.

    Raises:
        ConfigError: `bits=True` without a report of `apply(plan, checksum=True)`.

    Example:
        >>> import torch
        >>> from automodel_fn import apply, bf16, cast_plan
        >>> model = nn.Linear(2, 2)
        >>> plan = cast_plan(model, bf16)
        >>> _ = apply(plan)
        >>> audit(model, plan)
        ()
        >>> print(*audit(model.float(), plan), sep="\n")
        weight: dtype should be bfloat16, found float32
        bias: dtype should be bfloat16, found float32
    """
    if not isinstance(plan, CastPlan | CastReport):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"plan={type(plan).__name__} must be a CastPlan or a CastReport.")
    model_scan = scan(model)
    groups = storage_groups(model_scan.tensors)
    found = findings(plan.entries, model_scan, groups, attrgetter("to_dtype"))
    return (*found, *_changed_bits(model_scan, plan)) if bits else found


def _changed_bits(model_scan: ModelScan, plan: CastPlan | CastReport) -> tuple[Finding, ...]:
    if not isinstance(plan, CastReport) or not plan.checksums:
        raise ConfigError(
            "bits=True needs the report of apply(plan, checksum=True), which holds the checksums."
        )
    now = {name: item.tensor for item in model_scan.tensors for name in item.names}
    return tuple(
        Finding(name, what="bits", expected=f"{expected:016x}", found=f"{found:016x}")
        for name, expected in plan.checksums
        if name in now and (found := checksum(now[name])) != expected
    )
