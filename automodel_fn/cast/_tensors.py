"""Every tensor of a model, once, with all of its names."""

from __future__ import annotations

from collections.abc import Container, Mapping

import attrs
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from automodel_fn.cast._fsdp import FSDPGroup, fsdp_groups, shards_of_gathered
from automodel_fn.errors import ConfigError, itemized
from automodel_fn.fqn import WRAPPER_SEGMENTS, joined

PARAMETER, BUFFER, NONPERSISTENT_BUFFER = "parameter", "buffer", "nonpersistent_buffer"
_WRAPPING = WRAPPER_SEGMENTS | {"module", "base_model", "model"}
_RANK = {PARAMETER: 0, BUFFER: 1, NONPERSISTENT_BUFFER: 2}


@attrs.define  # frozen, making one takes twice as long, and a model has very many
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
    names: tuple[str, ...]
    raw_names: tuple[str, ...]
    kind: str


@attrs.frozen
class ModelScan:
    """A model's tensors and modules, in registration order.

    Args:
        tensors: Every tensor once.
        modules: (FQN without wrappers, raw FQN, module), every path, also of a module that is
            registered twice.
        fsdp_groups: What FSDP2 gathers together.
    """

    tensors: tuple[NamedTensor, ...]
    modules: tuple[tuple[str, str, nn.Module], ...] = attrs.field(kw_only=True)
    fsdp_groups: tuple[FSDPGroup, ...] = attrs.field(default=(), kw_only=True)


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
    modules = _walked(model)
    groups = fsdp_groups(module for _, _, module in modules)
    found = _Found(shards_of_gathered(groups))
    for name, raw_name, module in modules:
        if module._parameters:
            found.add(module._parameters, name, raw_name, PARAMETER)
        if module._buffers:
            found.add(module._buffers, name, raw_name, BUFFER, module._non_persistent_buffers_set)
    found.refuse_lazy()
    return ModelScan(found.named_tensors(), modules=modules, fsdp_groups=groups)


class _Found:
    """What a walk has found so far."""

    def __init__(self, shards: Mapping[int, torch.Tensor]) -> None:
        self._shards = shards
        self._by_id: dict[int, NamedTensor] = {}
        self._has_wrappers = False

    def add(
        self,
        held: Mapping[str, torch.Tensor | None],
        module: str,
        raw_module: str,
        kind: str,
        fleeting: Container[str] = (),
    ) -> None:
        """Add what one module holds; buffers under the `fleeting` keys are not persistent."""
        self._has_wrappers |= module is not raw_module
        for key, tensor in held.items():
            if tensor is None:
                continue
            if self._shards:
                tensor = self._shards.get(id(tensor), tensor)
            names = raw_names = (f"{module}.{key}" if module else key,)
            if module is not raw_module:
                raw_names = (joined(raw_module, key),)
            own_kind = NONPERSISTENT_BUFFER if key in fleeting else kind
            known = self._by_id.get(id(tensor))
            if known is not None:
                names, raw_names = known.names + names, known.raw_names + raw_names
                own_kind = min(known.kind, own_kind, key=_RANK.__getitem__)
            self._by_id[id(tensor)] = NamedTensor(tensor, names, raw_names, own_kind)

    def refuse_lazy(self) -> None:
        one_of_each_type = {type(item.tensor): item.tensor for item in self._by_id.values()}
        if not any(map(is_lazy, one_of_each_type.values())):
            return
        lazy = [item.raw_names[0] for item in self._by_id.values() if is_lazy(item.tensor)]
        raise ConfigError(
            itemized(
                f"model has {len(lazy)} parameters that are not initialized yet:",
                lazy,
                "Run one forward first, so that their shapes are known.",
            )
        )

    def named_tensors(self) -> tuple[NamedTensor, ...]:
        """All of them; where two would share a name without wrappers, there by raw names."""
        items = tuple(self._by_id.values())
        if not self._has_wrappers:
            return items
        holders: dict[str, int] = {}
        clashing: set[str] = set()
        for index, item in enumerate(items):
            clashing.update(n for n in item.names if holders.setdefault(n, index) != index)
        return tuple(_with_unique_names(item, clashing) for item in items)


def _with_unique_names(item: NamedTensor, clashing: Container[str]) -> NamedTensor:
    names = dict.fromkeys(
        raw if name in clashing else name
        for name, raw in zip(item.names, item.raw_names, strict=True)
    )
    return attrs.evolve(item, names=tuple(names))


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
