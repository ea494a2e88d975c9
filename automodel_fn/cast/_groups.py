"""What FSDP and DDP mean for a plan; found while planning, not at a forward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from automodel_fn.cast._entries import KEEP, TensorCast
from automodel_fn.cast._fsdp import FSDPGroup
from automodel_fn.cast._tensors import ModelScan
from automodel_fn.dtypes import dtype_name
from automodel_fn.errors import ConfigError, itemized

_Member = tuple[TensorCast, FSDPGroup]


def refuse_unfit_wrappers(model_scan: ModelScan, entries: Sequence[TensorCast]) -> None:
    """Raise if a wrapper around parameters could not go on once they are cast.

    Raises:
        ConfigError: As `refuse_mixed_dtypes`, and if DDP or FSDP1 would lose hold of parameters.
    """
    refuse_wrapped(model_scan, entries)
    refuse_mixed_dtypes(model_scan, entries)


def refuse_mixed_dtypes(model_scan: ModelScan, entries: Sequence[TensorCast]) -> None:
    """Raise if trainable parameters that FSDP2 gathers together would have several dtypes.

    Raises:
        ConfigError: With every such group.
    """
    by_group: defaultdict[FSDPGroup, defaultdict[torch.dtype, list[str]]]
    by_group = defaultdict(lambda: defaultdict(list))
    for entry, group in _members(model_scan, entries):
        if entry.requires_grad:
            by_group[group][entry.to_dtype].append(entry.name)
    mixed = [
        f"{_modules_of(group, model_scan)}: {_outline(dtypes)}"
        for group, dtypes in by_group.items()
        if len(dtypes) > 1
    ]
    if mixed:
        raise ConfigError(
            itemized(
                f"the plan gives {len(mixed)} FSDP groups trainable parameters of several dtypes, "
                "which fails at their first forward:",
                mixed,
                "Plan before fully_shard and shard with shard_by_plan(model, plan), which gives "
                "fp32 pins units of their own; plan.fsdp_units() lists them.",
            )
        )


def refuse_wrapped(model_scan: ModelScan, entries: Sequence[TensorCast]) -> None:
    """Raise if a wrapper of DDP or FSDP1 would lose hold of parameters.

    DDP hooks its reduction to what PyTorch makes anew when a parameter's dtype changes: the ranks
    would train apart from then on, without an error. FSDP1 has the parameters in a flat one, and
    would write it over them.

    Raises:
        ConfigError: With every such wrapper.
    """
    changing = {name for entry in entries if entry.changes for name in entry.names}
    wrapped = [
        f"{name!r} ({type(module).__name__}): {len(held)} parameters, as {held[0]!r}"
        for name, _, module in model_scan.modules
        if holds_parameters(module)
        if (held := [n for n in _held_by(module, model_scan) if n in changing])
    ]
    if wrapped:
        raise ConfigError(
            itemized(
                f"{len(wrapped)} wrappers hold parameters that are to be cast, and would no longer "
                "reduce their gradients:",
                wrapped,
                "Nothing was changed. Cast the model first, then wrap it; or cast what is in the "
                "wrapper (its .module), and wrap that anew.",
            )
        )


def holds_parameters(module: nn.Module) -> bool:
    """Whether it is a wrapper of DDP or FSDP1."""
    return isinstance(module, DistributedDataParallel | FullyShardedDataParallel)


def _held_by(module: nn.Module, model_scan: ModelScan) -> list[str]:
    if isinstance(module, FullyShardedDataParallel):
        held = set(map(id, module.parameters()))
    elif not hasattr(module, "reducer"):
        return []  # holds nothing: all is frozen, or it was never initialized
    else:
        given: Any = module.parameters_to_ignore
        ignored = {f"module.{name}" for name in given}
        named = module.named_parameters()
        held = {id(p) for name, p in named if p.requires_grad and name not in ignored}
    return [item.names[0] for item in model_scan.tensors if id(item.tensor) in held]


def _outline(dtypes: dict[torch.dtype, list[str]]) -> str:
    return ", ".join(
        f"{len(names)} in {dtype_name(dtype)} (as {names[0]!r})" for dtype, names in dtypes.items()
    )


def compute_notes(model_scan: ModelScan, entries: Sequence[TensorCast]) -> Iterator[str]:
    """Notes on fp32 pins that a policy of FSDP2 computes in another dtype."""
    found: defaultdict[torch.dtype, list[str]] = defaultdict(list)
    for entry, group in _members(model_scan, entries):
        computed = group.policy.param_dtype
        if entry.action == KEEP and computed not in (None, torch.float32):
            found[computed].append(entry.name)
    for dtype, names in found.items():
        yield (
            f"{len(names)} fp32 pins, as {names[0]!r}, are stored in float32 and computed in "
            f"{dtype_name(dtype)}: they are sharded with MixedPrecisionPolicy(param_dtype="
            f"{dtype_name(dtype)}); shard_by_plan gives them a policy of their own"
        )


def left_to_fsdp(model_scan: ModelScan) -> dict[int, str]:
    """By the id of each parameter that FSDP2 has sharded: why a frozen cast leaves it."""
    return {
        id(parameter): f"left to FSDP2, which has sharded it and computes in {_compute(group)}"
        for group in model_scan.fsdp_groups
        for parameter in group.parameters
    }


def _compute(group: FSDPGroup) -> str:
    dtype = group.policy.param_dtype
    return "the stored dtype" if dtype is None else dtype_name(dtype)


def in_fp32_units(model_scan: ModelScan, dtype: torch.dtype | None) -> frozenset[nn.Module]:
    """The modules in units that FSDP2 gives float32 and whose output it brings to `dtype`."""
    return frozenset(
        inner
        for group in model_scan.fsdp_groups
        if group.policy.param_dtype == torch.float32
        and group.policy.output_dtype == dtype
        and group.policy.cast_forward_inputs
        for module in group.modules
        for inner in module.modules()
    )


def _members(model_scan: ModelScan, entries: Sequence[TensorCast]) -> Iterator[_Member]:
    """The entries of parameters that FSDP2 has sharded, each with its group."""
    groups = model_scan.fsdp_groups
    if not groups:
        return
    by_name = {entry.name: entry for entry in entries}
    held = {id(item.tensor): by_name.get(item.names[0]) for item in model_scan.tensors}
    for group in groups:
        for parameter in group.parameters:
            entry = held.get(id(parameter))
            if entry is not None:
                yield entry, group


def _modules_of(group: FSDPGroup, model_scan: ModelScan) -> str:
    names = [name for name, _, module in model_scan.modules if module in group.modules]
    return ", ".join(map(repr, dict.fromkeys(names)))
