"""Which tensors belong to the frozen parts of a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from automodel_fn.cast._rules import uncastable
from automodel_fn.cast._tensors import PARAMETER, ModelScan, NamedTensor
from automodel_fn.errors import ConfigError
from automodel_fn.fqn import ancestry, owner_of

MIXED = ("base", "all", "none")


def frozen_rule(
    model_scan: ModelScan,
    mixed: str,
    pinned: Collection[int],
    *,
    is_castable: Callable[[NamedTensor], bool] = lambda item: uncastable(item) is None,
) -> Callable[[NamedTensor], str | None]:
    """For a tensor: why it is cast with the frozen parts, or None if it is not.

    A module is frozen if it has parameters in or beneath it and none of them is trainable. It is
    mixed if it owns a frozen parameter that could be cast and has a trainable one in or beneath it.

    Args:
        model_scan: The model's tensors.
        mixed: What is cast in mixed modules: "base" (their own frozen tensors), "all" (everything
            in and beneath them, as NeMo 0.7), or "none".
        pinned: The indices of fp32 pins.
        is_castable: Whether a tensor may be cast at all.

    Raises:
        ConfigError: Another `mixed`.
    """
    if mixed not in MIXED:
        raise ConfigError(f"mixed={mixed!r} must be one of {', '.join(map(repr, MIXED))}.")
    parameters = [item for item in model_scan.tensors if item.kind == PARAMETER]
    trained = _above(item for item in parameters if item.tensor.requires_grad)
    frozen = _above(parameters) - trained
    owners = {
        owner_of(name)
        for index, item in enumerate(model_scan.tensors)
        if item.kind == PARAMETER and not item.tensor.requires_grad
        if index not in pinned and is_castable(item)
        for name in item.names
    }
    bases = owners & trained

    def rule(item: NamedTensor) -> str | None:
        is_trainable = item.tensor.requires_grad
        for name in item.names:
            part = _outermost(name, frozen)
            if part is not None and not is_trainable:
                return f"in the frozen part {part!r}" if part else "the model is frozen"
            if mixed == "base" and not is_trainable and owner_of(name) in bases:
                return f"frozen, in the mixed module {owner_of(name)!r}"
            if mixed == "all" and (base := _outermost(name, bases)) is not None:
                return f"in the mixed module {base!r}, mixed='all'"
        return None

    return rule


def _modules_of(name: str) -> tuple[str, ...]:
    """The modules that a tensor lies in, outermost first; "" is the root."""
    return ("", *reversed(tuple(ancestry(owner_of(name)))))


def _outermost(name: str, modules: Collection[str]) -> str | None:
    return next((module for module in _modules_of(name) if module in modules), None)


def _above(items: Iterable[NamedTensor]) -> set[str]:
    return {module for item in items for name in item.names for module in _modules_of(name)}
