"""From what is asked for to what will run here, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch

from automodel_fn.backend._availability import Availability
from automodel_fn.backend._config import BackendConfig, values_of
from automodel_fn.backend._fp8 import RECIPES, TEFp8Config
from automodel_fn.backend._reasons import backend_name, notes_for, reason_for
from automodel_fn.backend._rules import (
    AUTO,
    CHOICES,
    PREFERRED,
    RUNNABLE,
    Rule,
    Values,
    broken,
    completions,
    contradictions,
    in_the_way,
    value_text,
)
from automodel_fn.dtypes import dtype_name
from automodel_fn.errors import BackendUnavailableError, ConfigError, itemized
from automodel_fn.plans import Row


@attrs.frozen
class FieldResolution:
    """What becomes of one field of a BackendConfig.

    Args:
        name: The field.
        asked: Its value in the config that was given.
        runs: Its value in the one that will run; another one only where "auto" was asked for.
        reason: Why.

    Example:
        >>> FieldResolution("attn", asked="auto", runs="sdpa", reason="no GPU").is_chosen
        True
    """

    name: str
    asked: Any = attrs.field(kw_only=True)
    runs: Any = attrs.field(kw_only=True)
    reason: str = attrs.field(kw_only=True)

    @property
    def is_chosen(self) -> bool:
        """Whether it was left to be chosen."""
        return isinstance(self.asked, str) and self.asked == AUTO

    def row(self) -> Row:
        """The same in words."""
        return Row(
            self.name,
            before=_word(self.asked),
            after=_word(self.runs),
            action="choose" if self.is_chosen else "take",
            reason=self.reason,
        )


@attrs.frozen
class Resolution:
    """What will run: a BackendConfig without "auto", and for each field why.

    Args:
        backend: What will run. Resolving it again gives it again.
        fields: One for each field of BackendConfig, in its order.
        notes: Remarks for a person, in a fixed order.

    Example:
        >>> cpu = Availability(python="3.11.7", torch="2.13.0")
        >>> print(resolve(BackendConfig(), cpu).field("linear").reason)
        auto: the first of te, torch that fits (fastest first); not te: transformer-engine is \
not installed; there is no CUDA GPU
    """

    backend: BackendConfig
    fields: tuple[FieldResolution, ...] = attrs.field(kw_only=True)
    notes: tuple[str, ...] = attrs.field(default=(), kw_only=True)

    def field(self, name: str) -> FieldResolution:
        """What became of the field of that name.

        Raises:
            ConfigError: There is no such field.
        """
        for each in self.fields:
            if each.name == name:
                return each
        raise ConfigError(f"field={name!r} is none of BackendConfig's.")

    def rows(self) -> tuple[Row, ...]:
        """One row a field, in order, for rendering."""
        return tuple(each.row() for each in self.fields)


def resolve(config: BackendConfig, availability: Availability) -> Resolution:
    """What of a backend will run on a machine, and why; pure, and the same for the same arguments.

    What is asked for by name is what runs, or an error: never another backend. "auto" takes the
    first that can run of: sdpa, te for `attn`; te, torch for `linear`; True, False for
    `rope_fusion` and `async_masks`; fused, torch for `swiglu` and `loss`; deepep, uccl_ep, torch
    for `dispatcher`; torch_mm, torch for `experts`, and te where FP8 would otherwise have nothing
    to act on. Choices are made so that they go together.

    Args:
        config: What is asked for; it is not changed.
        availability: The machine, as `probe()` finds it, or made up. Dispatchers other than
            "torch" need more than one rank, so probe where the process group is initialised, or
            under a launcher that sets WORLD_SIZE.

    Returns:
        A Resolution: the config that runs, with a reason for every field.

    Raises:
        BackendUnavailableError: What was asked for by name cannot run there; all of it is listed,
            each with what is missing and what can run instead.
        ConfigError: The arguments are of other types.

    Source:
        The defaults and `__post_init__` of `BackendConfig` (NeMo Automodel), which choose at import
        and replace what cannot run by something else.

    Example:
        >>> cpu = Availability(python="3.11.7", torch="2.13.0")
        >>> backend = resolve(BackendConfig(), cpu).backend
        >>> backend.attn, backend.linear, backend.rope_fusion, backend.experts
        ('sdpa', 'torch', True, 'torch')
        >>> resolve(BackendConfig(attn="te"), cpu)
        Traceback (most recent call last):
        automodel_fn.errors.BackendUnavailableError: this backend cannot run here
          attn='te': transformer-engine is not installed; there is no CUDA GPU; here can run: \
'sdpa', 'flex', 'eager'
    """
    _demand_kinds(config, availability)
    asked = values_of(config)
    allowed = {
        name: [value for value in values if _can_run(name, value, availability)]
        for name, values in PREFERRED.items()
    }
    missing = list(_missing(asked, availability))
    runs = next((each for each in completions(asked, allowed) if not broken(each)), None)
    if runs is None:
        missing += _not_together(asked, allowed, availability)
    if missing or runs is None:
        raise BackendUnavailableError(itemized("this backend cannot run here", missing))
    fields = tuple(
        FieldResolution(
            name, asked=value, runs=runs[name], reason=reason_for(name, asked, runs, availability)
        )
        for name, value in asked.items()
    )
    return Resolution(
        BackendConfig(**runs), fields=fields, notes=tuple(notes_for(runs, availability))
    )


def _demand_kinds(config: object, availability: object) -> None:
    for name, value, kind in (
        ("config", config, BackendConfig),
        ("availability", availability, Availability),
    ):
        if not isinstance(value, kind):
            raise ConfigError(
                f"{name}={type(value).__name__} must be of type {kind.__name__}; "
                "write resolve(BackendConfig(...), probe())."
            )


def _can_run(name: str, value: Any, found: Availability) -> bool:
    return value is None or found.verdict(backend_name(name, value)).can_run


def _missing(asked: Values, found: Availability) -> Iterator[str]:
    for name in RUNNABLE:
        value = asked[name]
        if value is None or value == AUTO or _can_run(name, value, found):
            continue
        reason = found.verdict(backend_name(name, value)).reason
        can = [
            value_text(other)
            for other in _others(name)
            if _can_run(name, other, found) and not contradictions({**asked, name: other})
        ]
        instead = f"here can run: {', '.join(can)}" if can else "nothing else goes with the rest"
        yield f"{name}={value_text(value)}: {reason}; {instead}"


def _others(name: str) -> tuple[Any, ...]:
    if name == "te_fp8":
        return (*map(TEFp8Config, RECIPES), None)
    if name in ("rope_fusion", "async_masks"):
        return (True, False)
    return tuple(value for value in CHOICES[name] if value != AUTO)


def _not_together(
    asked: Values, allowed: Mapping[str, list[Any]], found: Availability
) -> Iterator[str]:
    """What fails because no value that goes with the rest can run for a field that is "auto"."""
    for rule in in_the_way(completions(asked, allowed)):
        refused = "".join(
            f"; not {name}={value_text(value)}: {found.verdict(backend_name(name, value)).reason}"
            for name, value in _refused(rule, asked, allowed)
        )
        yield rule.complaint(asked) + refused


def _refused(
    rule: Rule, asked: Values, allowed: Mapping[str, list[Any]]
) -> Iterator[tuple[str, Any]]:
    for name in rule.fields:
        if asked[name] == AUTO:
            yield from ((name, v) for v in PREFERRED[name] if v not in allowed[name])


def _word(value: Any) -> str:
    if isinstance(value, TEFp8Config):
        return value.kind
    return dtype_name(value) if isinstance(value, torch.dtype) else str(value)
