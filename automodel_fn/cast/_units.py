"""Which modules FSDP2 has to take as units of their own, so that each pin is computed as pinned."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import attrs
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from automodel_fn.dtypes import dtype_name
from automodel_fn.errors import ConfigError
from automodel_fn.fqn import ancestry, owner_of

if TYPE_CHECKING:
    from automodel_fn.cast._entries import TensorCast

WHOLE, MIXED = "whole", "mixed"
_KEEP, _PARAMETER = "keep", "parameter"


@attrs.frozen
class FSDPUnit:
    """A module that has to be a unit of its own in `fully_shard`, and with which policy.

    Args:
        names: FQN of the module; several where modules share a pin, and are one unit together.
        kind: "whole": all its parameters stay in another dtype than the model's. "mixed": only
            some do; `fully_shard` alone cannot take it, `shard_by_plan` gives it two groups.
        pins: FQNs of the parameters that stay in another dtype.
        stored_dtype: The dtype that those are stored and computed in.
        output_dtype: The dtype that the module's outputs are brought to, that of the model; None
            where the module computes in both and brings them there itself.
        reason: Why, in words.

    Example:
        >>> from automodel_fn import bf16, cast_plan
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
        >>> for unit in cast_plan(model, bf16, keep_fp32="1").fsdp_units():
        ...     print(unit.names, unit.kind, unit.pins, unit.policy().param_dtype)
        ('1',) whole ('1.weight', '1.bias') torch.float32
    """

    names: tuple[str, ...]
    kind: str = attrs.field(kw_only=True, validator=attrs.validators.in_((WHOLE, MIXED)))
    pins: tuple[str, ...] = attrs.field(kw_only=True)
    stored_dtype: torch.dtype = attrs.field(kw_only=True)
    output_dtype: torch.dtype | None = attrs.field(kw_only=True)
    reason: str = attrs.field(kw_only=True)

    def policy(self) -> MixedPrecisionPolicy:
        """The policy for `fully_shard`: its inputs, parameters and gradients in the stored dtype.

        That of a mixed one says nothing of dtypes, so that each parameter is computed in its own.
        """
        if self.kind == MIXED:
            return MixedPrecisionPolicy(cast_forward_inputs=False)
        return MixedPrecisionPolicy(
            param_dtype=self.stored_dtype,
            reduce_dtype=self.stored_dtype,
            output_dtype=self.output_dtype,
            cast_forward_inputs=True,
        )


def units_of(entries: Sequence[TensorCast], dtype: torch.dtype | None) -> tuple[FSDPUnit, ...]:
    """The units that a plan's entries need, in the order of the model.

    As few as are exact: the largest modules wholly of one other dtype, but no lists of modules,
    which have no forward. Such units are not joined further into groups of several modules: before
    PyTorch 2.13 a group casts the inputs of its first module and the outputs of its last alone.

    Raises:
        ConfigError: `dtype` is None.
    """
    if dtype is None:
        raise ConfigError(
            "dtype=None: this plan has no single dtype (it is an inverse), so no units; ask the "
            "plan of the cast itself."
        )
    parameters = [entry for entry in entries if entry.kind == _PARAMETER]
    whole = _whole_modules(parameters, dtype)
    units: dict[str, tuple[list[str], list[TensorCast]]] = {}
    for entry in parameters:
        if not _is_apart(entry, dtype):
            continue
        names = list(dict.fromkeys(_module_for(name, whole) for name in entry.names))
        pins = [entry]
        for known in dict.fromkeys(name for name in names if name in units):
            if known in units:
                more_names, more_pins = units[known]
                names, pins = [*more_names, *names], [*more_pins, *pins]
        unit = list(dict.fromkeys(names)), list(dict.fromkeys(pins))
        units.update(dict.fromkeys(unit[0], unit))
    distinct = {id(unit): unit for unit in units.values()}
    return tuple(_unit(names, pins, whole, dtype) for names, pins in distinct.values())


def _is_apart(entry: TensorCast, dtype: torch.dtype) -> bool:
    """Whether a parameter cannot be in one group with those of the plan's dtype."""
    is_other = entry.to_dtype != dtype and entry.to_dtype.is_floating_point
    return is_other and (entry.action == _KEEP or entry.requires_grad)


def _whole_modules(parameters: Iterable[TensorCast], dtype: torch.dtype) -> set[str]:
    """The modules with parameters of one other dtype only, that may have a forward."""
    dtypes: defaultdict[str, set[torch.dtype | None]] = defaultdict(set)
    children: defaultdict[str, set[str]] = defaultdict(set)
    for entry in parameters:
        found = entry.to_dtype if _is_apart(entry, dtype) else None
        for name in entry.names:
            for module in _modules_of(name):
                dtypes[module].add(found)
                rest = name[len(module) + 1 :] if module else name
                children[module].add(rest.partition(".")[0])
    return {
        module
        for module, found in dtypes.items()
        if len(found) == 1 and None not in found
        if not all(child.isdecimal() for child in children[module])
    }


def _modules_of(name: str) -> Iterator[str]:
    """The modules that a tensor lies in, outermost first; "" is the root."""
    yield from ("", *reversed(tuple(ancestry(owner_of(name)))))


def _module_for(name: str, whole: set[str]) -> str:
    return next((module for module in _modules_of(name) if module in whole), owner_of(name))


def _unit(
    names: list[str], pins: list[TensorCast], whole: set[str], dtype: torch.dtype
) -> FSDPUnit:
    is_whole = whole.issuperset(names)
    stored = pins[0].to_dtype
    of = f"{len(pins)} parameters stay in {dtype_name(stored)}, as {pins[0].name!r}"
    if len(names) > 1:
        of += ", which these modules share"
    rest = "" if is_whole else f"; others in the module become {dtype_name(dtype)}"
    return FSDPUnit(
        tuple(names),
        kind=WHOLE if is_whole else MIXED,
        pins=tuple(pin.name for pin in pins),
        stored_dtype=stored,
        output_dtype=dtype if is_whole else None,
        reason=f"{of} ({pins[0].reason}){rest}",
    )
