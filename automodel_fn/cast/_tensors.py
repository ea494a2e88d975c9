"""Every tensor of a model, once, with all of its names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import attrs
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from automodel_fn.cast._fsdp import fsdp_groups, shards_of_gathered
from automodel_fn.errors import ConfigError, itemized
from automodel_fn.fqn import WRAPPER_SEGMENTS, joined

PARAMETER, BUFFER, NONPERSISTENT_BUFFER = "parameter", "buffer", "nonpersistent_buffer"
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


@attrs.define
class _Found:
    tensor: torch.Tensor
    names: list[str]
    raw_names: list[str]
    kind: str


def scan(model: nn.Module) -> ModelScan:
    """Walk a model: each parameter and buffer once, by identity, under all of its names.

    Of a parameter that FSDP2 has gathered for a forward, the shard is what is found. Reads only,
    and needs no tensor data: a model on the meta device gives the same names.

    Args:
        model: Any module.

    Raises:
        ConfigError: `model` is no module, or has parameters that are not initialized yet.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"model={type(model).__name__} must be a torch.nn.Module.")
    modules = tuple(_walk(model))
    shards = shards_of_gathered(fsdp_groups(module for _, _, module in modules))
    found: dict[int, _Found] = {}
    for name, raw_name, module in modules:
        for key, tensor in module._parameters.items():
            if tensor is not None:
                tensor = shards.get(id(tensor), tensor)
                _add(found, tensor, joined(name, key), joined(raw_name, key), PARAMETER)
        for key, tensor in module._buffers.items():
            if tensor is not None:
                is_fleeting = key in module._non_persistent_buffers_set
                kind = NONPERSISTENT_BUFFER if is_fleeting else BUFFER
                _add(found, tensor, joined(name, key), joined(raw_name, key), kind)
    _refuse_lazy(found.values())
    return ModelScan(_with_unique_names(list(found.values())), modules=modules)


def _walk(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    pending = [("", "", model, "")]
    while pending:
        name, raw_name, module, wrapper = pending.pop()
        yield name, raw_name, module
        for key, child in reversed(module._modules.items()):
            if child is None:
                continue
            is_outermost = module is model or bool(wrapper)
            is_wrapped = _is_wrapped(module, key, child, wrapper if is_outermost else None)
            child_name = name if is_wrapped else joined(name, key)
            child_wrapper = key if is_outermost and is_wrapped else ""
            pending.append((child_name, joined(raw_name, key), child, child_wrapper))


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


def _add(found: dict[int, _Found], tensor: torch.Tensor, name: str, raw: str, kind: str) -> None:
    known = found.get(id(tensor))
    if known is None:
        found[id(tensor)] = _Found(tensor, [name], [raw], kind)
        return
    known.names.append(name)
    known.raw_names.append(raw)
    known.kind = min(known.kind, kind, key=_RANK.__getitem__)


def _refuse_lazy(found: Iterable[_Found]) -> None:
    lazy = [item.raw_names[0] for item in found if is_lazy(item.tensor)]
    if lazy:
        raise ConfigError(
            itemized(
                f"model has {len(lazy)} parameters that are not initialized yet:",
                lazy,
                "Run one forward first, so that their shapes are known.",
            )
        )


def _with_unique_names(found: list[_Found]) -> tuple[NamedTensor, ...]:
    """Names without wrappers, except where two tensors would share one: there the raw names."""
    holders: dict[str, int] = {}
    clashing: set[str] = set()
    for index, item in enumerate(found):
        clashing.update(name for name in item.names if holders.setdefault(name, index) != index)
    return tuple(
        NamedTensor(
            item.tensor,
            names=tuple(
                dict.fromkeys(
                    raw if name in clashing else name
                    for name, raw in zip(item.names, item.raw_names, strict=True)
                )
            ),
            raw_names=tuple(item.raw_names),
            kind=item.kind,
        )
        for item in found
    )
