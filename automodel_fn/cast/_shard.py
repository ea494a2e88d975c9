"""Shard a model with FSDP2 so that what a plan keeps is stored, computed and trained as kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from operator import attrgetter
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from automodel_fn.cast._compare import findings
from automodel_fn.cast._fsdp import class_of, second_placement
from automodel_fn.cast._plan import CastPlan
from automodel_fn.cast._rules import storage_groups
from automodel_fn.cast._tensors import ModelScan, scan
from automodel_fn.cast._units import WHOLE, FSDPUnit
from automodel_fn.errors import ConfigError, StalePlanError, itemized
from automodel_fn.fqn import ancestry, owner_of, parse_patterns, unmatched_message

_AS_STORED = MixedPrecisionPolicy()
_NO_OFFLOAD = OffloadPolicy()


@attrs.frozen
class _Call:
    """One call of `fully_shard`."""

    names: tuple[str, ...]
    policy: MixedPrecisionPolicy = attrs.field(kw_only=True)
    apart: frozenset[int] = attrs.field(default=frozenset(), kw_only=True)


def shard_by_plan(
    model: nn.Module,
    plan: CastPlan,
    mesh: DeviceMesh | None = None,
    *,
    units: str | Iterable[str] = (),
    mp_policy: MixedPrecisionPolicy = _AS_STORED,
    reshard_after_forward: bool | int | None = None,
    offload_policy: OffloadPolicy = _NO_OFFLOAD,
) -> nn.Module:
    """Shard a model that a plan was applied to with FSDP2 (`fully_shard`), in place.

    The units of `plan.fsdp_units()` come first, with policies of their own: a pinned module gets
    float32 inputs, computes in float32, and returns the plan's dtype. Then come the modules that
    `units` names, then the model. A module that has pins beside other parameters becomes a unit
    with two groups of parameters, each computed as it is stored, whatever `mp_policy` says, and its
    inputs are not cast.

    Args:
        model: The model, after `apply(plan)`, on any device, also on meta.
        plan: The plan.
        mesh: The mesh to shard over; by default all ranks.
        units: Modules that are units as well, as the layers: exact FQNs, globs (`*` crosses dots;
            of modules inside one another the outermost counts) or "re:" with a full match.
        mp_policy: The policy of everything that the plan does not keep.
        reshard_after_forward: As in `fully_shard`.
        offload_policy: As in `fully_shard`.

    Returns:
        The same model.

    Raises:
        StalePlanError: The plan was not applied to the model.
        ConfigError: A pattern that matches nothing, a model that is sharded already, or a module
            with two groups where the mesh has several dimensions. Nothing was changed.
        BackendUnavailableError: This PyTorch has no way known here to shard a module in two groups.

    Example:
        >>> import torch.distributed as dist
        >>> from automodel_fn import apply, bf16, cast_plan
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
        >>> plan = cast_plan(model, bf16, keep_fp32="1")
        >>> _ = apply(plan)
        >>> mesh = init_device_mesh("cpu", (1,))
        >>> shard_by_plan(model, plan, mesh)(torch.ones(1, 2, dtype=bf16)).dtype
        torch.bfloat16
        >>> model[1].weight.dtype, model[2].weight.dtype
        (torch.float32, torch.bfloat16)
        >>> dist.destroy_process_group()
    """
    model_scan = scan(model)
    _refuse_unready(plan, model_scan)
    modules = {name: module for name, _, module in reversed(model_scan.modules)}
    calls = _calls(plan, model_scan, modules, units, mp_policy)
    mesh = _all_ranks() if mesh is None else mesh
    placement = None
    if any(call.apart for call in calls):
        _refuse_no_second_mesh(mesh, model_scan)
        placement = second_placement(mesh)
    for call in calls:
        named = [modules[name] for name in call.names]
        fully_shard(
            named[0] if len(named) == 1 else named,
            mesh=mesh,
            mp_policy=call.policy,
            reshard_after_forward=reshard_after_forward,
            offload_policy=offload_policy,
            shard_placement_fn=partial(_placed, call, placement) if call.apart else None,
        )
    return model


def _placed(call: _Call, placement: Any, parameter: torch.Tensor) -> Any:
    return placement if id(parameter) in call.apart else None


def _all_ranks() -> DeviceMesh:
    accelerator = torch.accelerator.current_accelerator()
    return init_device_mesh(
        "cpu" if accelerator is None else accelerator.type, (dist.get_world_size(),)
    )


def _refuse_unready(plan: CastPlan, model_scan: ModelScan) -> None:
    groups = storage_groups(model_scan.tensors)
    found = findings(plan.entries, model_scan, groups, attrgetter("to_dtype"))
    if found:
        raise StalePlanError(
            itemized(
                f"the model is not as the plan leaves it: {len(found)} differences",
                map(str, found),
                "Nothing was sharded. Call apply(plan) first.",
            )
        )
    if any(isinstance(module, FSDPModule) for _, _, module in model_scan.modules):
        raise ConfigError(
            "model: parts of it are sharded already, and fully_shard can be applied to a module "
            "once; give shard_by_plan the model as it was before."
        )


def _refuse_no_second_mesh(mesh: DeviceMesh, model_scan: ModelScan) -> None:
    if mesh.ndim != 1 or any(isinstance(item.tensor, DTensor) for item in model_scan.tensors):
        raise ConfigError(
            f"mesh={mesh}: a module with fp32 pins beside other parameters is sharded in two "
            "groups, over a mesh of one dimension and from plain tensors alone; nothing was "
            "sharded. Move the pins into a module of their own with a forward (plan.fsdp_units() "
            "lists those of kind 'mixed')."
        )


def _calls(
    plan: CastPlan,
    model_scan: ModelScan,
    modules: Mapping[str, nn.Module],
    units: str | Iterable[str],
    mp_policy: MixedPrecisionPolicy,
) -> list[_Call]:
    """All calls of `fully_shard`, what lies deeper first."""
    held = {item.names[0]: id(item.tensor) for item in model_scan.tensors}
    calls = {name: _Call((name,), policy=mp_policy) for name in ("", *_asked(units, modules))}
    for unit in plan.fsdp_units():
        for names, pins in _that_run(unit, modules):
            if not pins:
                calls.update(dict.fromkeys(names, _Call(names, policy=unit.policy())))
                continue
            known = [calls[name] for name in names if name in calls]
            one = _Call(
                tuple(dict.fromkeys([*names, *(name for call in known for name in call.names)])),
                policy=MixedPrecisionPolicy(
                    reduce_dtype=mp_policy.reduce_dtype,
                    output_dtype=mp_policy.output_dtype if known else None,
                    cast_forward_inputs=False,
                ),
                apart=frozenset(held[pin] for pin in pins).union(*(call.apart for call in known)),
            )
            calls.update(dict.fromkeys(one.names, one))
    return sorted(dict.fromkeys(calls.values()), key=lambda call: -max(map(_depth, call.names)))


def _depth(name: str) -> int:
    return len(tuple(ancestry(name)))


def _asked(units: str | Iterable[str], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """The modules that the patterns name; of those inside one another the outermost."""
    patterns = parse_patterns(units, "units")
    unmatched = [pattern for pattern in patterns if not any(map(pattern.matches, modules))]
    if unmatched:
        raise ConfigError(unmatched_message("units", unmatched, modules))
    for pattern in patterns:
        for name in filter(pattern.matches, modules):
            above = tuple(ancestry(name))[1:]
            if not any(map(pattern.matches, above)) and _runs(modules[name]):
                yield name


def _runs(module: nn.Module) -> bool:
    """Whether a module has a forward, around which FSDP2 can gather its parameters."""
    return class_of(module).forward is not nn.Module.forward


def _that_run(
    unit: FSDPUnit, modules: Mapping[str, nn.Module]
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """The modules with a forward that stand for a unit, and which pins are a group of their own.

    A container has no forward: what is in it counts, and parameters right in it belong to the
    module that holds the container.
    """
    if unit.kind == WHOLE and all(_runs(modules[name]) for name in unit.names):
        yield unit.names, ()
        return
    if unit.kind == WHOLE and len(unit.names) == 1:
        (name,) = unit.names
        inner = {pin: _outermost_that_runs(pin, name, modules) for pin in unit.pins}
        yield from (((module,), ()) for module in dict.fromkeys(filter(None, inner.values())))
        pins = tuple(pin for pin, module in inner.items() if module is None)
    else:
        pins = unit.pins
    if pins:
        holders = (_holder_that_runs(name, modules) for name in unit.names)
        yield tuple(dict.fromkeys(holders)), pins


def _outermost_that_runs(pin: str, top: str, modules: Mapping[str, nn.Module]) -> str | None:
    inside = [name for name in reversed(tuple(ancestry(owner_of(pin)))) if _is_in(name, top)]
    return next((name for name in inside if _runs(modules[name])), None)


def _is_in(name: str, top: str) -> bool:
    return not top or name == top or name.startswith(f"{top}.")


def _holder_that_runs(name: str, modules: Mapping[str, nn.Module]) -> str:
    return next((above for above in ancestry(name) if _runs(modules[above])), "")
