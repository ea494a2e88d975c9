"""Every tensor of a model, once, with all of its names."""

from __future__ import annotations

import attrs
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from automodel_fn.errors import ConfigError, itemized
from automodel_fn.fqn import WRAPPER_SEGMENTS, joined

PARAMETER, BUFFER, NONPERSISTENT_BUFFER = "parameter", "buffer", "nonpersistent_buffer"
_WRAPPING = WRAPPER_SEGMENTS | {"module", "base_model", "model"}
_RANK = {PARAMETER: 0, BUFFER: 1, NONPERSISTENT_BUFFER: 2}


@attrs.frozen
class NamedTensor:
    """One tensor object of a model.

    Args:
        tensor: The tensor itself.
        names: Its FQNs without wrappers; the first is canonical, the rest are aliases.
        raw_names: The same with wrappers, as `named_parameters` spells them.
        kind: "parameter", "buffer" or "nonpersistent_buffer"; the first of these that any of its
            names is.
    """

    tensor: torch.Tensor = attrs.field(eq=False, repr=False)
    names: tuple[str, ...] = attrs.field(kw_only=True)
    raw_names: tuple[str, ...] = attrs.field(kw_only=True)
    kind: str = attrs.field(kw_only=True)


@attrs.frozen
class ModelScan:
    """A model's tensors and modules, in registration order.

    Args:
        tensors: Every tensor once.
        modules: (FQN without wrappers, raw FQN, module), every path, also of a module that is
            registered twice.
    """

    tensors: tuple[NamedTensor, ...]
    modules: tuple[tuple[str, str, nn.Module], ...] = attrs.field(kw_only=True)


def scan(model: nn.Module) -> ModelScan:
    """Walk a model: each parameter and buffer once, by identity, under all of its names.

    Reads only, and needs no tensor data: a model on the meta device gives the same names.

    Args:
        model: Any module.

    Raises:
        ConfigError: `model` is no module, or has parameters that are not initialized yet.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"model={type(model).__name__} must be a torch.nn.Module.")
    modules = _walked(model)
    found = _Found()
    for name, raw_name, module in modules:
        for key, tensor in module._parameters.items():
            if tensor is not None:
                found.add(tensor, name, raw_name, key, PARAMETER)
        if module._buffers:
            fleeting = module._non_persistent_buffers_set
            for key, tensor in module._buffers.items():
                if tensor is not None:
                    kind = NONPERSISTENT_BUFFER if key in fleeting else BUFFER
                    found.add(tensor, name, raw_name, key, kind)
    found.refuse_lazy()
    return ModelScan(found.named_tensors(), modules=modules)


class _Found:
    """What a walk has found so far; four lists, since a model may have very many tensors."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._tensors: list[torch.Tensor] = []
        self._names: list[tuple[str, ...]] = []
        self._raw_names: list[tuple[str, ...]] = []
        self._kinds: list[str] = []
        self._has_wrappers = False

    def add(self, tensor: torch.Tensor, module: str, raw_module: str, key: str, kind: str) -> None:
        name = f"{module}.{key}" if module else key
        raw = name
        if module is not raw_module:
            self._has_wrappers = True
            raw = f"{raw_module}.{key}" if raw_module else key
        place = self._places.setdefault(id(tensor), len(self._tensors))
        if place == len(self._tensors):
            names = (name,)
            self._tensors.append(tensor)
            self._names.append(names)
            self._raw_names.append(names if raw is name else (raw,))
            self._kinds.append(kind)
            return
        self._names[place] += (name,)
        self._raw_names[place] += (raw,)
        self._kinds[place] = min(self._kinds[place], kind, key=_RANK.__getitem__)

    def refuse_lazy(self) -> None:
        one_of_each_type = {type(tensor): tensor for tensor in self._tensors}
        if not any(map(is_lazy, one_of_each_type.values())):
            return
        lazy = [raw[0] for raw, t in zip(self._raw_names, self._tensors, strict=True) if is_lazy(t)]
        raise ConfigError(
            itemized(
                f"model has {len(lazy)} parameters that are not initialized yet:",
                lazy,
                "Run one forward first, so that their shapes are known.",
            )
        )

    def named_tensors(self) -> tuple[NamedTensor, ...]:
        found = zip(self._tensors, self._unique_names(), self._raw_names, self._kinds, strict=True)
        return tuple(
            NamedTensor(tensor, names=names, raw_names=raw_names, kind=kind)
            for tensor, names, raw_names, kind in found
        )

    def _unique_names(self) -> list[tuple[str, ...]]:
        """Names without wrappers, except where two tensors would share one: there the raw names."""
        if not self._has_wrappers:
            return self._names
        holders: dict[str, int] = {}
        clashing: set[str] = set()
        for index, names in enumerate(self._names):
            clashing.update(n for n in names if holders.setdefault(n, index) != index)
        return [
            tuple(
                dict.fromkeys(
                    raw if name in clashing else name
                    for name, raw in zip(names, raw_names, strict=True)
                )
            )
            for names, raw_names in zip(self._names, self._raw_names, strict=True)
        ]


def _walked(model: nn.Module) -> tuple[tuple[str, str, nn.Module], ...]:
    """Every path to a module: the name without wrappers, the raw name (one object if equal)."""
    walked: list[tuple[str, str, nn.Module]] = []
    pending: list[tuple[str, str, nn.Module, str]] = [("", "", model, "")]
    while pending:
        name, raw_name, module, wrapper = pending.pop()
        walked.append((name, raw_name, module))
        if not module._modules:
            continue
        is_outermost = module is model or bool(wrapper)
        for key, child in reversed(module._modules.items()):
            if child is None:
                continue
            if key in _WRAPPING and _is_wrapped(
                module, key, child, wrapper if is_outermost else None
            ):
                pending.append((name, joined(raw_name, key), child, key if is_outermost else ""))
                continue
            child_name = f"{name}.{key}" if name else key
            child_raw = child_name if name is raw_name else joined(raw_name, key)
            pending.append((child_name, child_raw, child, ""))
    return tuple(walked)


def _is_wrapped(module: nn.Module, key: str, child: nn.Module, wrapper: str | None) -> bool:
    """Whether `module` only wraps `child`, so that its name is left out.

    `module` (DDP) and `base_model.model` (PEFT) are names that a model's own parts may have as
    well: they count by class, or outermost, where the wrapper has nothing else in it. `wrapper` is
    the name under which an outermost `module` is wrapped itself ("" for the root), None elsewhere.
    """
    if key in WRAPPER_SEGMENTS:
        return True
    if key == "module" and isinstance(module, DistributedDataParallel | DataParallel):
        return True
    if wrapper is None or len(module._modules) != 1 or module._parameters or module._buffers:
        return False
    return (
        key == "module"
        or (key == "base_model" and set(child._modules) == {"model"})
        or (key == "model" and wrapper == "base_model")
    )
