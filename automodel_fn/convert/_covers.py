"""Classes that FSDP2 has made over other classes, and how to make more like them.

`fully_shard` exchanges the class of a module for `FSDPX(FSDPModule, X)`, one for each `X`, which it
keeps in a table. What it does to a module is in hooks and not in that class, so that a module may
get the one of another `X`.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch.distributed.fsdp import FSDPModule, fully_shard


def uncovered(cls: type[Any]) -> type[Any]:
    """The class that FSDP2 has made `cls` of, or `cls` itself.

    Example:
        >>> uncovered(int)
        <class 'int'>
    """
    bases = cls.__bases__
    is_cover = len(bases) == 2 and bases[0] is FSDPModule and _made_by_fsdp().get(bases[1]) is cls
    return bases[1] if is_cover else cls


def covered_as(cls: type[Any], inner: type[Any]) -> type[Any]:
    """`inner`, covered as `cls` is: by the class that `fully_shard` would make of it, or by none.

    Example:
        >>> covered_as(int, float)
        <class 'float'>
    """
    if uncovered(cls) is cls:
        return inner
    made = _made_by_fsdp()
    if inner not in made:
        namespace = {"__deepcopy__": vars(cls)["__deepcopy__"]}
        made[inner] = type(f"FSDP{inner.__name__}", (FSDPModule, inner), namespace)
    return made[inner]


def _made_by_fsdp() -> dict[type[Any], type[Any]]:
    """FSDP2's own table; where a version of PyTorch has none, no class is known as a cover."""
    return inspect.unwrap(fully_shard).__globals__.get("cls_to_fsdp_cls", {})
