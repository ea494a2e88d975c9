"""FSDP2's own records of a model. The one file that knows its private side.

PyTorch has no public way to change the dtype of a parameter that `fully_shard` has taken over once
a forward has run, to see how parameters are grouped, or to shard parameters of one module in two
groups. What is used here was run with PyTorch 2.11 and 2.13, and is looked for before it is used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from automodel_fn.errors import BackendUnavailableError, ConfigError

_OF_A_STATE = ("_fsdp_param_groups",)
_OF_A_GROUP = (
    *("fsdp_params", "modules", "mp_policy", "comm_ctx"),
    *("_init_mp_dtypes", "_partial_reduce_output"),
)
_OF_A_PARAMETER = (
    *("sharded_param", "_sharded_param_data", "all_gather_outputs"),
    *("unsharded_accumulated_grad", "reset_sharded_param"),
)


@attrs.frozen(eq=False)
class FSDPGroup:
    """Parameters that FSDP2 gathers together.

    Args:
        modules: The modules that were given to `fully_shard`.
        parameters: The sharded parameters.
        policy: The policy that they were sharded with.
        record: FSDP2's own record.
    """

    modules: tuple[nn.Module, ...]
    parameters: tuple[torch.Tensor, ...] = attrs.field(kw_only=True)
    policy: MixedPrecisionPolicy = attrs.field(kw_only=True)
    record: Any = attrs.field(kw_only=True, repr=False)


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, also where `fully_shard` has put its own before it."""
    kind = type(module)
    return next(base for base in kind.__mro__ if not issubclass(base, FSDPModule))


def copied_without_fsdp(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a module as it was before `fully_shard`, which forbids a copy of its own."""
    for part in reversed(tuple(module.modules())):
        if isinstance(part, FSDPModule):
            kind = class_of(part)
            twin = memo[id(part)] = kind.__new__(kind)
            # FSDP2's record is an attribute of the module too, and its hooks hold it.
            memo[id(part._get_fsdp_state())] = None
            hooks = {key: type(value)() for key, value in vars(part).items() if "_hooks" in key}
            vars(twin).update(copy.deepcopy(vars(part) | hooks, memo))
    return copy.deepcopy(module, memo)


def fsdp_groups(modules: Iterable[nn.Module]) -> tuple[FSDPGroup, ...]:
    """The groups of all modules that `fully_shard` was given, each once.

    Raises:
        BackendUnavailableError: This PyTorch keeps other records than those known here.
    """
    found: dict[int, FSDPGroup] = {}
    held = tuple(modules)
    kinds = {kind for kind in set(map(type, held)) if issubclass(kind, FSDPModule)}
    for module in held if kinds else ():
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        _refuse_unknown(state, _groups_attribute(state))
        for record in _records(state):
            _refuse_unknown(record, _OF_A_GROUP)
            for parameter in record.fsdp_params:
                _refuse_unknown(parameter, _OF_A_PARAMETER)
            found[id(record)] = FSDPGroup(
                tuple(record.modules),
                parameters=tuple(p.sharded_param for p in record.fsdp_params),
                policy=record.mp_policy,
                record=record,
            )
    return tuple(found.values())


def _groups_attribute(state: Any) -> tuple[str, ...]:
    # Before a module could have several groups, there was one or None.
    return ("_fsdp_param_group",) if not hasattr(state, _OF_A_STATE[0]) else _OF_A_STATE


def _records(state: Any) -> Sequence[Any]:
    if hasattr(state, _OF_A_STATE[0]):
        return state._fsdp_param_groups
    return () if state._fsdp_param_group is None else (state._fsdp_param_group,)


def _refuse_unknown(record: Any, wanted: Iterable[str]) -> None:
    missing = [name for name in wanted if not hasattr(record, name)]
    if missing:
        raise BackendUnavailableError(
            f"torch={torch.__version__}: FSDP2's {type(record).__name__} has no "
            f"{', '.join(missing)}, which casting a sharded model needs (run with 2.11 and 2.13). "
            "Cast before fully_shard, which needs nothing private, or use a known version."
        )


def shards_of_gathered(groups: Iterable[FSDPGroup]) -> dict[int, torch.Tensor]:
    """By the id of a parameter that was gathered for a forward: the sharded one."""
    names = ("_unsharded_param", "_sharded_post_forward_param")
    return {
        id(gathered): parameter.sharded_param
        for group in groups
        for parameter in group.record.fsdp_params
        for name in names
        if (gathered := getattr(parameter, name, None)) is not None
    }


def unfinished(
    groups: Iterable[FSDPGroup], name_of: Callable[[torch.Tensor], str]
) -> tuple[str, ...]:
    """Parameters of which a forward waits for its backward, or gradients to be reduced.

    Both are held in gathered parameters of the old dtype, which a cast has to let go.
    """
    return tuple(
        f"{name_of(parameter.sharded_param)}: {found}"
        for group in groups
        for parameter in group.record.fsdp_params
        if (found := _unfinished(group.record, parameter)) is not None
    )


def _unfinished(group: Any, parameter: Any) -> str | None:
    gathered = getattr(parameter, "_unsharded_param", None)
    if gathered is None:
        return None
    # The last is of ranks that hold replicas of shards, and have not summed them up.
    pending = (gathered.grad, parameter.unsharded_accumulated_grad, group._partial_reduce_output)
    if any(gradient is not None for gradient in pending):
        return "its gradient is not reduced yet"
    # Twice: by its own object, and by the node of a graph that adds to its gradient.
    if gathered._use_count() > 1 and group.comm_ctx.post_forward_order:
        return "a forward waits for its backward"
    return None


def reshard(modules: Iterable[nn.Module]) -> None:
    """Let FSDP2 take back what it gathered for a forward, so that the shards are what is seen."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()


Padded = tuple[tuple[Any, torch.Tensor], ...]
"""For each of FSDP2's parameters the flat data that it gathers from: its shard, padded."""


def padded_data(groups: Iterable[FSDPGroup]) -> Padded:
    """What FSDP2 gathers from, after it has looked at its parameters as they are now."""
    parameters = [p for group in groups for p in group.record.fsdp_params]
    with torch.no_grad():
        for parameter in parameters:
            parameter.reset_sharded_param()
    return tuple((parameter, parameter._sharded_param_data) for parameter in parameters)


def refresh(groups: Iterable[FSDPGroup]) -> None:
    """Let FSDP2 look at its parameters anew, after their content was exchanged."""
    for group in groups:
        for parameter in group.record.fsdp_params:
            with torch.no_grad():
                parameter.reset_sharded_param()
            parameter.all_gather_outputs = []
            if hasattr(parameter, "_unsharded_param"):
                del parameter._unsharded_param
        try:
            _look_at_dtypes(group)
        except AssertionError as error:
            raise ConfigError(
                f"a group of FSDP2 would be left with parameters of several dtypes: {error}. "
                "Nothing was changed."
            ) from None


def put_back(groups: Iterable[FSDPGroup], padded: Padded) -> None:
    """The same after an exchange was rolled back; allocates nothing."""
    for parameter, data in padded:
        parameter._sharded_param_data = data
        with torch.no_grad():
            parameter.reset_sharded_param()
    for group in groups:
        with suppress(AssertionError):  # of a group that had several dtypes before
            _look_at_dtypes(group)


def _look_at_dtypes(group: FSDPGroup) -> None:
    # Before the first forward FSDP2 has not looked at all.
    if all(hasattr(parameter, "orig_dtype") for parameter in group.record.fsdp_params):
        group.record._init_mp_dtypes()


def second_placement(mesh: DeviceMesh) -> Any:
    """What a `shard_placement_fn` returns for parameters that are a second group of their module.

    FSDP2 groups parameters by process group: this is a second one of the same ranks. The ranks of
    the mesh have to call it together.

    Raises:
        BackendUnavailableError: This PyTorch has no such thing.
    """
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import (
            FSDPMeshInfo,
            ShardPlacementResult,
        )
    except ImportError as error:
        raise BackendUnavailableError(
            f"torch={torch.__version__}: FSDP2 cannot shard the parameters of one module in two "
            f"groups ({error}). Move the fp32 pins into a module of their own with a forward."
        ) from error
    group: Any = dist.new_group(mesh.mesh.flatten().tolist(), use_local_synchronization=True)
    second = DeviceMesh.from_group(group, mesh.device_type)
    return ShardPlacementResult(None, FSDPMeshInfo(second, shard_mesh_dim=0))
