"""What a cast must do, worked out again in the slowest and most obvious way.

Shares nothing with the code that it judges: names are spelled out path by path, patterns are
matched one by one, every rule is asked of every tensor.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence

import attrs
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from automodel_fn.testing._twin import is_plain, storage_key

CASTABLE = (torch.float32, torch.bfloat16, torch.float16)
MILD_SKIP, CAST, KEEP, FIRM_SKIP = range(4)
ACTIONS = {MILD_SKIP: "skip", CAST: "cast", KEEP: "keep", FIRM_SKIP: "skip"}
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@attrs.frozen
class Path:
    """One way from the root to a tensor: `modules[i]` holds `keys[i]`."""

    modules: tuple[nn.Module, ...]
    keys: tuple[str, ...]

    @property
    def raw_name(self) -> str:
        """The name as PyTorch spells it."""
        return ".".join(self.keys)

    def name(self, start: int = 0) -> str:
        """The name without wrappers, from the module of that number on."""
        is_wrapper = _wrapper_places(self)
        return ".".join(k for i, k in enumerate(self.keys) if i >= start and not is_wrapper[i])

    @property
    def owner(self) -> nn.Module:
        """The module that has the tensor."""
        return self.modules[-1]


def _wrapper_places(path: Path) -> list[bool]:
    places: list[bool] = []
    for i, (module, key) in enumerate(zip(path.modules[:-1], path.keys[:-1], strict=True)):
        child = path.modules[i + 1]
        holds_nothing_else = len(module._modules) == 1 and not (
            module._parameters or module._buffers
        )
        places.append(
            key in _WRAPPERS
            or (key == "module" and isinstance(module, DataParallel | DistributedDataParallel))
            or (key == "module" and holds_nothing_else and all(places))
            or (key == "base_model" and set(child._modules) == {"model"}
                and holds_nothing_else and all(places))
            or (key == "model" and holds_nothing_else and i > 0 and all(places)
                and path.keys[i - 1] == "base_model")
        )  # fmt: skip
    return [*places, False]


@attrs.define
class Case:
    """One tensor, all ways to it, and what must become of it."""

    tensor: torch.Tensor
    paths: list[Path]
    is_parameter: bool
    is_persistent: bool
    weight: int = FIRM_SKIP
    to_dtype: torch.dtype = torch.float32

    @property
    def names(self) -> tuple[str, ...]:
        """Its names without wrappers, each once."""
        return tuple(dict.fromkeys(path.name() for path in self.paths))

    def settle(self, weight: int, to_dtype: torch.dtype | None = None) -> None:
        """Note what must become of it."""
        self.weight, self.to_dtype = weight, to_dtype or self.tensor.dtype


def cases_of(model: nn.Module) -> list[Case]:
    """Every tensor of a model once."""
    cases: dict[int, Case] = {}
    for path in _paths(model, (), ()):
        owner, key = path.owner, path.keys[-1]
        tensor = owner._parameters.get(key)
        is_parameter = tensor is not None
        tensor = tensor if is_parameter else owner._buffers[key]
        case = cases.setdefault(id(tensor), Case(tensor, [], False, False))  # pyright: ignore[reportArgumentType]
        case.paths.append(path)
        case.is_parameter |= is_parameter
        case.is_persistent |= not is_parameter and key not in owner._non_persistent_buffers_set
    return list(cases.values())


def _paths(
    module: nn.Module, modules: tuple[nn.Module, ...], keys: tuple[str, ...]
) -> Iterator[Path]:
    for held in (module._parameters, module._buffers):
        for key, tensor in held.items():
            if tensor is not None:
                yield Path((*modules, module), (*keys, key))
    for key, child in module._modules.items():
        if child is not None:
            yield from _paths(child, (*modules, module), (*keys, key))


def without_parametrizations(name: str) -> str:
    """The name of what a parametrization stands for."""
    return re.sub(r"parametrizations\.([^.]+)\.original[0-9]*(?![^.])", r"\1", name)


def is_declared_pin(case: Case, match: str) -> bool:
    """Whether any module above the tensor declares a keyword that its name from there on has."""
    for path in case.paths:
        for i, module in enumerate(path.modules):
            relative = without_parametrizations(path.name(i))
            for keyword in _keywords(module):
                if match == "substring" and keyword in relative:
                    return True
                if match == "segment" and f".{keyword}." in f".{relative}.":
                    return True
    return False


def _keywords(module: nn.Module) -> Iterator[str]:
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        if attribute in vars(module) or hasattr(type(module), attribute):
            yield from getattr(module, attribute) or ()


def is_named(case: Case, patterns: str | Iterable[str]) -> bool:
    """Whether a pattern names the tensor or a module above it, in any spelling."""
    spellings = [name for path in case.paths for name in (path.name(), path.raw_name)]
    spellings += [without_parametrizations(name) for name in spellings]
    for name in spellings:
        segments = name.split(".")
        for end in range(1, len(segments) + 1):
            for pattern in [patterns] if isinstance(patterns, str) else patterns:
                if _matches(pattern, ".".join(segments[:end])):
                    return True
    return False


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return pattern == name or fnmatch.fnmatchcase(name, pattern)


def settle_kind(case: Case, dtype: torch.dtype, buffers: str, is_pin: bool) -> None:
    """Settle a tensor that nothing skips, by its kind and by whether it is an fp32 pin."""
    if not is_plain(case.tensor) or case.tensor.dtype not in CASTABLE:
        case.settle(FIRM_SKIP)
    elif is_pin:
        case.settle(KEEP, torch.float32)
    elif (
        not case.is_parameter and buffers != "all" and (buffers == "none" or not case.is_persistent)
    ) or case.tensor.dtype == dtype:
        case.settle(MILD_SKIP)
    else:
        case.settle(CAST, dtype)


def settle_shared_storages(cases: Sequence[Case]) -> None:
    """One decision a storage, the strongest; none where it is read in several dtypes."""
    for case in cases:
        group = [c for c in cases if _share(c.tensor, case.tensor)]
        if len(group) < 2 or group[0] is not case:
            continue
        if len({c.tensor.dtype for c in group}) > 1:
            for member in group:
                member.settle(FIRM_SKIP)
            continue
        strongest = max(group, key=lambda c: c.weight)
        for member in group:
            member.settle(strongest.weight, strongest.to_dtype)


def _share(left: torch.Tensor, right: torch.Tensor) -> bool:
    if not (is_plain(left) and is_plain(right) and left.numel() and right.numel()):
        return left is right
    return storage_key(left) == storage_key(right)
