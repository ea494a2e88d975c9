"""The outcome that each planner must come to, by the slow way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import attrs
import torch
from torch import nn

from automodel_fn.cast._plan import CastPlan
from automodel_fn.testing._facts import Fact, Facts, fact_of
from automodel_fn.testing._oracle import (
    ACTIONS,
    FIRM_SKIP,
    Case,
    cases_of,
    is_declared_pin,
    is_named,
    settle_kind,
    settle_shared_storages,
)
from automodel_fn.testing._twin import bits_of, is_plain, storage_key, tensors_of


def expected_cast(
    model: nn.Module,
    dtype: torch.dtype,
    *,
    keep_fp32: str | Iterable[str] = (),
    skip: str | Iterable[str] = (),
    match: str = "substring",
    buffers: str = "persistent",
) -> list[Case]:
    """What `cast_plan` must decide.

    Raises:
        ValueError: `match="hf"`, which is transformers' own rule; it has no second way here.
    """
    if match == "hf":
        raise ValueError("match='hf' has no oracle; use match='substring' or 'segment'.")
    cases = cases_of(model)
    for case in cases:
        is_pin = is_declared_pin(case, match) or is_named(case, keep_fp32)
        if is_named(case, skip):
            case.settle(FIRM_SKIP)
        else:
            settle_kind(case, dtype, buffers, is_pin)
    settle_shared_storages(cases)
    return cases


def expected_uniform(model: nn.Module, dtype: torch.dtype) -> list[Case]:
    """What a temporary cast must do on entry."""
    cases = cases_of(model)
    for case in cases:
        settle_kind(case, dtype, "all", is_pin=False)
    settle_shared_storages(cases)
    return cases


def expected_frozen(
    model: nn.Module, dtype: torch.dtype, *, mixed: str = "base", buffers: str = "all"
) -> list[Case]:
    """What `frozen_cast_plan` must decide."""
    cases = cases_of(model)
    pins = {id(case.tensor) for case in cases if is_declared_pin(case, "substring")}
    for case in cases:
        if _is_in_frozen_part(case) or _is_in_mixed_part(case, mixed, pins):
            settle_kind(case, dtype, buffers, id(case.tensor) in pins)
        else:
            case.settle(FIRM_SKIP)
    settle_shared_storages(cases)
    return cases


def _is_in_frozen_part(case: Case) -> bool:
    above = [module for path in case.paths for module in path.modules]
    return not case.tensor.requires_grad and any(map(_is_frozen, above))


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def _is_in_mixed_part(case: Case, mixed: str, pins: set[int]) -> bool:
    if mixed == "base":
        owners = [path.owner for path in case.paths]
        return not case.tensor.requires_grad and any(_is_mixed(owner, pins) for owner in owners)
    above = [module for path in case.paths for module in path.modules]
    return mixed == "all" and any(_is_mixed(module, pins) for module in above)


def _is_mixed(module: nn.Module, pins: set[int]) -> bool:
    """Owns a frozen parameter that could be cast, and has a trainable one in or beneath it."""
    own = [p for p in module._parameters.values() if p is not None and not p.requires_grad]
    castable = (torch.float32, torch.bfloat16, torch.float16)
    has_base = any(is_plain(p) and p.dtype in castable and id(p) not in pins for p in own)
    return has_base and any(p.requires_grad for p in module.parameters())


def facts_after(model: nn.Module, targets: Mapping[int, torch.dtype]) -> Facts:
    """What each name must stand for once every tensor has its target dtype: bits of `tensor.to`.

    `tensor.to` gives a NaN other bits in another layout; where views of one storage overlap, an
    element may have the bits that any of them asks for.

    Args:
        model: The model as it was before.
        targets: The dtype afterwards, by the id of the tensor.
    """
    named = dict(tensors_of(model))
    return {
        name: _fact_after(tensor, targets[id(tensor)], list(named.values()))
        for name, tensor in named.items()
    }


def _fact_after(tensor: torch.Tensor, dtype: torch.dtype, all_tensors: list[torch.Tensor]) -> Fact:
    if dtype == tensor.dtype:
        return fact_of(tensor)
    after = tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
    if tensor.grad is not None:
        follows = tensor.grad.dtype == tensor.dtype
        after.grad_dtype = None
        after.grad = tensor.grad.to(dtype) if follows else tensor.grad
    overlaid = [_overlaid(tensor, t, dtype) for t in all_tensors if _overlap(tensor, t)]
    return attrs.evolve(fact_of(after), bits_where_shared=tuple(overlaid))


def _overlap(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    if other is tensor or not (is_plain(other) and tensor.numel() and other.numel()):
        return False
    return not tensor.is_meta and storage_key(tensor) == storage_key(other)


def _overlaid(tensor: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bits of the tensor after its cast if `other` were cast over it."""
    length = tensor.untyped_storage().nbytes() // tensor.dtype.itemsize
    numbers = torch.arange(length, device=tensor.device)
    image = torch.zeros(length, dtype=dtype, device=tensor.device)
    for view in (tensor, other):
        places = numbers.as_strided(view.shape, view.stride(), view.storage_offset())
        image[places.reshape(-1)] = view.detach().to(dtype).reshape(-1)
    places = numbers.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return bits_of(image[places])


def targets_of(cases: Iterable[Case]) -> dict[int, torch.dtype]:
    """The dtype that each tensor must have afterwards, by its id."""
    return {id(case.tensor): case.to_dtype for case in cases}


def losses_after(cases: Iterable[Case]) -> list[tuple[int, int]]:
    """For each tensor or gradient: how many values float16 makes infinite, and how many zero."""
    cast = {
        id(tensor): tensor.detach()
        for case in cases
        if case.to_dtype == torch.float16 != case.tensor.dtype
        for tensor in (case.tensor, case.tensor.grad)
        if tensor is not None and tensor.dtype == case.tensor.dtype and not tensor.is_meta
    }
    return sorted(loss for tensor in cast.values() if any(loss := _loss(tensor)))


def _loss(tensor: torch.Tensor) -> tuple[int, int]:
    values = tensor.double().flatten().tolist(), tensor.half().double().flatten().tolist()
    pairs = list(zip(*values, strict=True))
    return (
        sum(math.isinf(new) and math.isfinite(old) for old, new in pairs),
        sum(new == 0 and old != 0 for old, new in pairs),
    )


def disagreements(plan: CastPlan, cases: list[Case]) -> list[str]:
    """Where a plan says something else than the oracle."""
    entries = {name: entry for entry in plan.entries for name in entry.names}
    found: list[str] = []
    for case in cases:
        wanted = f"{ACTIONS[case.weight]} {case.tensor.dtype} to {case.to_dtype}"
        known = {id(e): e for e in (entries.get(name) for name in case.names) if e is not None}
        said = [f"{e.action} {e.from_dtype} to {e.to_dtype}" for e in known.values()]
        if said != [wanted]:
            found.append(f"{case.names} must be planned as {wanted}, found {said or 'nothing'}")
    if len(plan.entries) != len(cases):
        found.append(f"the plan has {len(plan.entries)} entries for {len(cases)} tensors")
    return found
