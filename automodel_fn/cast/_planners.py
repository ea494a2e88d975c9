"""The planners: a model in, a CastPlan out. They read only, and need no tensor data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from automodel_fn.cast._autocast import autocast_note
from automodel_fn.cast._batches import batches_of
from automodel_fn.cast._frozen import frozen_rule
from automodel_fn.cast._groups import (
    compute_notes,
    in_fp32_units,
    left_to_fsdp,
    refuse_mixed_dtypes,
    refuse_wrapped,
)
from automodel_fn.cast._layout import Layout
from automodel_fn.cast._pins import Pins, declared_pins
from automodel_fn.cast._plan import CastPlan
from automodel_fn.cast._promotion import boundary_owners, pin_owners
from automodel_fn.cast._rules import (
    Decision,
    cast_to,
    decide,
    kept,
    skipped,
    storage_groups,
    uncastable,
)
from automodel_fn.cast._selection import selected
from automodel_fn.cast._tensors import BUFFER, NONPERSISTENT_BUFFER, ModelScan, NamedTensor, scan
from automodel_fn.dtypes import parse_castable
from automodel_fn.errors import ConfigError
from automodel_fn.plans import WeakObjects

BUFFERS = ("persistent", "all", "none")

_NO_PINS = Pins({}, notes=())


def cast_plan(
    model: nn.Module,
    dtype: torch.dtype | str,
    *,
    keep_fp32: str | Iterable[str] = (),
    skip: str | Iterable[str] = (),
    match: str = "substring",
    buffers: str = "persistent",
    optimizers: Iterable[Optimizer] = (),
) -> CastPlan:
    """What casting a model to `dtype` will do to each of its tensors. Does not touch the model.

    Float32, bfloat16 and float16 tensors are cast; integers, bools, complex, float64, float8 and
    smaller, and tensors of a subclass with a representation of its own are left alone. Float32
    stay: what the model declares in `_keep_in_fp32_modules` and `_keep_in_fp32_modules_strict`,
    and what `keep_fp32` names. Replaces `cast_model_to_dtype` (NeMo Automodel).

    Args:
        model: The model, on any device, also on meta.
        dtype: bf16, fp16 or fp32, as a torch dtype or its name.
        keep_fp32: Further fp32 pins: exact FQNs, globs (`*` crosses dots), or "re:" with a full
            match; each names a tensor, or a module and with it everything beneath.
        skip: What to leave wholly alone, in the same grammar; stronger than a pin.
        match: How declared keywords match: "substring" (as NeMo Automodel), "segment" (whole
            dotted segments), or "hf" (transformers' own rule and matcher: plain keywords count for
            float16 only).
        buffers: Which buffers are cast: "persistent", "all" or "none". Rotary `inv_freq` is not
            persistent: rounding it to bf16 turns positions by up to 0.8 rad at position 8192.
        optimizers: Optimizers whose state of a parameter's shape is cast along; referred to weakly.

    Returns:
        The plan, to read, compare, write to JSON, and `apply`.

    Raises:
        ConfigError: An argument that is none of these, a pattern that matches nothing, a
            declaration that is no list of keywords, or a group of FSDP2 whose trainable parameters
            would have several dtypes.

    Example:
        >>> from automodel_fn import bf16
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        >>> for entry in cast_plan(model, bf16, keep_fp32="1").entries:
        ...     print(entry.name, entry.action, entry.reason)
        0.weight cast no rule keeps it
        0.bias cast no rule keeps it
        1.weight keep fp32 pin: keep_fp32='1'
        1.bias keep fp32 pin: keep_fp32='1'
    """
    target = parse_castable(dtype)
    given = _checked_optimizers(optimizers)
    model_scan = scan(model)
    left = selected(model_scan, skip, "skip")
    asked = selected(model_scan, keep_fp32, "keep_fp32")
    declared = declared_pins(model_scan, match, target)
    reasons = declared.reasons | {
        index: f"fp32 pin: keep_fp32={pattern!r}" for index, pattern in asked.items()
    }
    pins = Pins(reasons, notes=declared.notes)

    def rule(index: int, item: NamedTensor) -> Decision:
        if index in left:
            return skipped(item, f"skip={left[index]!r}")
        return _pinned_or(item, index, pins, lambda: cast_rule(item, target, buffers))

    _check_buffers(buffers)
    return _plan(model, model_scan, rule, target, pins, given)


def frozen_cast_plan(
    model: nn.Module,
    compute_dtype: torch.dtype | str | None,
    *,
    mixed: str = "base",
    buffers: str = "all",
) -> CastPlan:
    """What casting the frozen parts of a model to their compute dtype will do. Changes nothing.

    Where trainable weights are stored in float32 and computed in bf16, a fully frozen part (a
    vision tower) needs no float32 storage: every largest subtree without a trainable parameter is
    cast, parameters and buffers; declared fp32 pins stay. Parameters that FSDP2 has sharded are
    left to it, since its mixed precision policy says what they are computed in. Replaces
    `cast_frozen_modules_to_compute_dtype` (NeMo Automodel).

    Args:
        model: The model, with `requires_grad` set as it will be trained.
        compute_dtype: The dtype that the forward computes in; None plans nothing.
        mixed: What becomes of a module that owns frozen tensors and has trainable adapters in or
            beneath it: "base" casts what is frozen there and leaves the adapters, "all" casts
            those too (what NeMo 0.7 does), "none" casts neither.
        buffers: Which buffers of frozen parts are cast: "all", "persistent" or "none".

    Returns:
        The plan; trainable tensors outside of mixed modules are never cast.

    Raises:
        ConfigError: An argument that is none of these.

    Example:
        >>> from automodel_fn import bf16
        >>> model = nn.ModuleDict({"tower": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
        >>> _ = model["tower"].requires_grad_(False)
        >>> [entry.action for entry in frozen_cast_plan(model, bf16).entries]
        ['cast', 'cast', 'skip', 'skip']
    """
    _check_buffers(buffers)
    model_scan = scan(model)
    if compute_dtype is None:
        frozen_rule(model_scan, mixed, ())
        return _plan(model, model_scan, lambda _, item: skipped(item, "compute_dtype=None"))
    target = parse_castable(compute_dtype, "compute_dtype")
    pins = declared_pins(model_scan, "substring", target)
    frozen = frozen_rule(model_scan, mixed, pins.reasons)
    left = left_to_fsdp(model_scan)

    def rule(index: int, item: NamedTensor) -> Decision:
        reason = frozen(item)
        if reason is None:
            return uncastable(item) or skipped(item, "trainable, or not in a frozen part")
        if id(item.tensor) in left:
            return skipped(item, f"{reason}; {left[id(item.tensor)]}")
        return _pinned_or(item, index, pins, lambda: cast_rule(item, target, buffers, reason))

    return _plan(model, model_scan, rule, target, pins)


def uniform_plan(model: nn.Module, dtype: torch.dtype) -> CastPlan:
    """Every castable tensor to `dtype`, pins and all buffers included; for a cast that ends."""
    model_scan = scan(model)
    plan = _plan(model, model_scan, lambda _, item: cast_rule(item, dtype, "all"), dtype)
    refuse_wrapped(model_scan, plan.entries)
    return plan


def _pinned_or(
    item: NamedTensor, index: int, pins: Pins, otherwise: Callable[[], Decision]
) -> Decision:
    """The decision for a pin, or what stands otherwise."""
    reason = pins.reasons.get(index)
    return otherwise() if reason is None else kept(item, reason)


def cast_rule(item: NamedTensor, dtype: torch.dtype, buffers: str, reason: str = "") -> Decision:
    """The decision for a tensor that nothing pins: cast it if its kind is cast."""
    found = uncastable(item)
    if found is not None:
        return found
    if item.kind == NONPERSISTENT_BUFFER and buffers != "all":
        return skipped(item, f"a buffer that is not persistent, buffers={buffers!r}", is_mild=True)
    if item.kind == BUFFER and buffers == "none":
        return skipped(item, "a buffer, buffers='none'", is_mild=True)
    return cast_to(item, dtype, reason or "no rule keeps it")


def _check_buffers(buffers: str) -> None:
    if buffers not in BUFFERS:
        raise ConfigError(f"buffers={buffers!r} must be one of {', '.join(map(repr, BUFFERS))}.")


def _checked_optimizers(optimizers: object) -> tuple[Optimizer, ...]:
    given: tuple[Any, ...] = tuple(optimizers) if isinstance(optimizers, Iterable) else ()
    wrong = [item for item in given if not isinstance(item, Optimizer)]
    if wrong or not isinstance(optimizers, Iterable):
        found = type(wrong[0] if wrong else optimizers).__name__
        raise ConfigError(
            f"optimizers={found} must be several torch.optim.Optimizer, as in "
            "optimizers=[optimizer]."
        )
    return given


def _plan(
    model: nn.Module,
    model_scan: ModelScan,
    rule: Callable[[int, NamedTensor], Decision],
    dtype: torch.dtype | None = None,
    pins: Pins = _NO_PINS,
    optimizers: Iterable[Optimizer] = (),
) -> CastPlan:
    groups = storage_groups(model_scan.tensors)
    entries, shared = decide(model_scan.tensors, groups, rule)
    refuse_mixed_dtypes(model_scan, entries)
    owners = pin_owners(model_scan, entries)
    needed = boundary_owners(owners, dtype, in_fp32_units(model_scan, dtype))
    boundaries = tuple(owner.note() for owner in needed)
    computed = (*autocast_note(owners, dtype), *compute_notes(model_scan, entries))
    gone = [e.name for e in entries if e.action == "keep" and e.changes]
    return CastPlan(
        entries,
        dtype=dtype,
        notes=(*pins.notes, *shared, *_gone_note(gone), *boundaries, *computed),
        model_ref=WeakObjects(model),
        optimizer_refs=WeakObjects(*optimizers),
        layout=Layout(model_scan, entries, batches_of(entries, model_scan.tensors, groups)),
    )


def _gone_note(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return (
        f"{len(names)} fp32 pins are stored in less, as {names[0]!r}: they are cast up, but their "
        "low bits were gone before",
    )
