"""A cast that ends: inside the block the model has one dtype, afterwards its own again."""

from __future__ import annotations

import logging
from collections.abc import Container, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from automodel_fn.cast._batches import batches_of, conversions_of
from automodel_fn.cast._bits import merged, same_bits
from automodel_fn.cast._conversions import Conversion, dry_run, each_with_data, gradient_of
from automodel_fn.cast._convert import converted, converted_views, write
from automodel_fn.cast._exchange import Exchange, Originals, exchange
from automodel_fn.cast._interrupts import interrupts_deferred
from automodel_fn.cast._planners import cast_plan, uniform_plan
from automodel_fn.cast._rules import storage_groups
from automodel_fn.cast._sharded import Shards, together
from automodel_fn.cast._tensors import ModelScan, scan
from automodel_fn.dtypes import CASTABLE, parse_castable
from automodel_fn.errors import ConfigError, itemized

_logger = logging.getLogger("automodel_fn")


@contextmanager
def temporary_cast(
    model: nn.Module, dtype: torch.dtype | str, then: torch.dtype | str | None = None
) -> Generator[nn.Module]:
    """Run a block with every float of a model in `dtype`; afterwards each has its own dtype again.

    Inside, all float32, bfloat16 and float16 tensors have `dtype`, fp32 pins and all buffers
    included. Afterwards, also after an error, every tensor has the dtype it had before: elements
    not edited inside have their old bits, edited ones are the rounding of the edit. Costs the
    originals' memory while it lasts. Replaces `yield_fp32_model` (NeMo Automodel), which brings
    back one dtype for all, and rounds what it did not change.

    Args:
        model: The model.
        dtype: The dtype inside: bf16, fp16 or fp32.
        then: Afterwards give the tensors the dtypes of `cast_plan(model, then)` instead, made from
            what was there before and from the edits; its fp32 pins are exact. Its notes are
            logged, as `apply` does.

    Yields:
        The same model.

    Raises:
        ConfigError: A dtype that tensors are not cast to, or parameters that DDP or FSDP1 holds.
            Or, once everything else is back, parameters that were put into the model inside and
            are not initialized.

    Example:
        >>> from automodel_fn import bf16, fp32
        >>> model = nn.Linear(2, 2).bfloat16()
        >>> with temporary_cast(model, fp32):
        ...     _ = nn.init.trunc_normal_(model.weight, std=0.02)
        >>> model.weight.dtype
        torch.bfloat16
    """
    inside = parse_castable(dtype)
    plan = uniform_plan(model, inside)
    model_scan = scan(model)
    targets = {name: entry.from_dtype for entry in plan.entries for name in entry.names}
    if then is not None:
        afterwards = cast_plan(model, then)
        targets = {name: entry.to_dtype for entry in afterwards.entries for name in entry.names}
        if afterwards.notes:
            _logger.warning(itemized("the cast plan has notes:", afterwards.notes))
    conversions: tuple[Conversion, ...] = ()
    originals: Originals | None = None
    is_over = False
    try:
        try:
            with interrupts_deferred() as check_interrupt, together(model_scan) as shards:
                groups = storage_groups(model_scan.tensors)
                batches = batches_of(plan.entries, model_scan.tensors, groups)
                tensors = tuple(item.tensor for item in model_scan.tensors)
                conversions = conversions_of(batches, tensors)
                dry_run(conversions)
                exchanges = [conversion.exchange() for conversion in conversions]
                check_interrupt()
                originals = exchange(exchanges, shards, keep_originals=True)
            yield model
        finally:
            _bring_back(model, model_scan, targets, conversions, originals)
            is_over = True
    except BaseException:
        # An interrupt may come before it can be deferred. What is back already stays as it is.
        if not is_over:
            _bring_back(model, model_scan, targets, conversions, originals)
        raise


def _bring_back(
    model: nn.Module,
    model_scan: ModelScan,
    targets: Mapping[str, torch.dtype],
    conversions: Sequence[Conversion],
    originals: Originals | None,
) -> None:
    if originals is None:
        return
    with interrupts_deferred():
        back = _returns(targets, conversions, originals)
        try:
            now = scan(model)
        except ConfigError:
            # What came inside cannot be cast; what was there before comes back nevertheless.
            exchange(back, Shards(model_scan, is_way_back=True), must_finish=True)
            raise
        handled = {id(tensor) for conversion in conversions for tensor in conversion.tensors}
        back += _latecomers(now, targets, handled)
        exchange(back, Shards(now, is_way_back=True), must_finish=True)


def _returns(
    targets: Mapping[str, torch.dtype],
    conversions: Sequence[Conversion],
    originals: Originals,
) -> list[Exchange]:
    """The way back for what was cast on entry."""
    made: list[Exchange] = []
    for conversion, data in each_with_data(conversions, originals):
        make = partial(_merged_all, conversion.tensors, data, targets[conversion.owners[0]])
        made.append(Exchange.at_once(conversion.names, conversion.tensors, make))
    return made


def _latecomers(
    now: ModelScan, targets: Mapping[str, torch.dtype], handled: Container[int]
) -> Iterator[Exchange]:
    """Tensors and gradients that were put into the model inside, or had the dtype already."""
    items = [item for item in now.tensors if id(item.tensor) not in handled]
    groups = {index: group for group in storage_groups(items) for index in group}
    for index, item in enumerate(items):
        group = groups.get(index, [index])
        if index == group[0]:
            tensors = tuple(items[member].tensor for member in group)
            yield from _to_target(item.names[0], tensors, targets)
    known = {id(item.tensor) for item in items}
    for item in now.tensors:
        grad = gradient_of(item.tensor)
        if grad is not None and id(grad) not in handled and id(grad) not in known:
            known.add(id(grad))
            yield from _to_target(item.names[0], (grad,), targets)


def _to_target(
    name: str, tensors: tuple[torch.Tensor, ...], targets: Mapping[str, torch.dtype]
) -> Iterator[Exchange]:
    target, stored = targets.get(name), tensors[0].dtype
    if target in CASTABLE and stored in CASTABLE and target != stored:
        yield Exchange.at_once((name,), tensors, partial(_converted, tensors, target))


def _converted(tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """One tensor, or all that are views of one storage, in `dtype`."""
    convert = converted if len(tensors) == 1 else converted_views
    return convert(tensors, dtype)


def _merged_all(
    tensors: tuple[torch.Tensor, ...], originals: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """The originals with the edits in them, on their old storage where the dtype is their own."""
    if len(tensors) == 1:
        return (_written_back(originals[0], merged(originals[0], tensors[0].detach(), dtype)),)
    before = converted_views(originals, tensors[0].dtype)
    edited = [
        merged(original, tensor.detach(), dtype, unedited)
        for original, tensor, unedited in zip(originals, tensors, before, strict=True)
    ]
    fresh = converted_views(originals, dtype)
    for view, values in zip(fresh, edited, strict=True):
        write(view, values)
    return fresh


def _written_back(original: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """`result` on the storage of `original`, if it fits there; safe to repeat."""
    if original.dtype != result.dtype or original.shape != result.shape:
        return result
    if same_bits(original, result):
        return original
    if original.layout is not torch.strided:
        return result
    is_expanded = any(
        step == 0 and size > 1 for step, size in zip(original.stride(), original.shape, strict=True)
    )
    return result if is_expanded else original.copy_(result)
