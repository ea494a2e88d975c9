"""What surrounds an exchange in a sharded model: FSDP2's records, gradients, and other ranks.

The ranks of a mesh cast together or not at all: each says whether it could, and all hear it before
anyone lets an original go.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from automodel_fn.cast._fsdp import (
    Padded,
    padded_data,
    put_back,
    refresh,
    reshard,
    unfinished,
)
from automodel_fn.cast._tensors import ModelScan
from automodel_fn.errors import ConfigError, OtherRankError, itemized

_TRIES = 64


class Shards:
    """The sharded side of one exchange. In a model without DTensors it does nothing.

    Args:
        model_scan: The model.
        vote: That of all ranks on whether the exchange stands; None where each is on its own.
        is_way_back: Whether the tensors get back what they had: that is done first, and only then
            said what is amiss.
    """

    def __init__(
        self, model_scan: ModelScan, vote: Vote | None = None, *, is_way_back: bool = False
    ) -> None:
        self._vote = vote
        self._is_way_back = is_way_back
        self._cut_off: tuple[str, ...] = ()
        sharded = [item for item in model_scan.tensors if isinstance(item.tensor, DTensor)]
        self._tensors = tuple(item.tensor for item in sharded)
        self._names = {id(item.tensor): item.names[0] for item in sharded}
        self._modules = tuple(module for _, _, module in model_scan.modules) if sharded else ()
        self._groups = model_scan.fsdp_groups if sharded else ()
        self._padded: Padded = ()
        self._grads: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.are_any = bool(sharded)

    def begin(self, tensors: Iterable[torch.Tensor]) -> None:
        """Make ready for an exchange of the content of `tensors`.

        Raises:
            ConfigError: One of them cannot be exchanged now; nothing was changed.
        """
        if not self.are_any:
            return
        sharded = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
        self._refuse_watched(sharded)
        waiting = unfinished(self._groups, self._name_of)
        if self._is_way_back:
            self._cut_off = waiting
        elif waiting:
            raise ConfigError(
                itemized(
                    f"{len(waiting)} sharded parameters are in the middle of a step:",
                    waiting,
                    "Nothing was changed. Cast before a forward or after its backward, and after "
                    "the last microbatch of a step; drop the loss of a forward that gets no "
                    "backward.",
                )
            )
        reshard(self._modules)
        self._padded = padded_data(self._groups)
        changing = {id(tensor) for tensor in sharded}
        self._grads = [
            (owner, grad)
            for owner in self._tensors
            if (grad := owner.grad) is not None and not changing.isdisjoint((id(owner), id(grad)))
        ]
        for tensor, _ in self._grads:
            tensor.grad = None

    def refresh(self) -> None:
        """After the exchange, bring FSDP2's records up."""
        refresh(self._groups)

    def confirm(self) -> None:
        """Hear whether all ranks got here; if so, the exchange stands.

        Raises:
            OtherRankError: Another rank did not; the exchange has to be rolled back.
            ConfigError: On a way back: it stands, but what waited is cut off.
        """
        if self._cut_off:
            raise ConfigError(
                itemized(
                    f"{len(self._cut_off)} sharded parameters were in the middle of a step:",
                    self._cut_off,
                    "They are back as they were, and the step is lost. Drop its loss and clear its "
                    "gradients; run the backward of a forward inside of the block.",
                )
            )
        if self._vote is not None and not self._vote.hear(True):
            raise OtherRankError(
                "the cast failed on another rank, so it was rolled back on this one: the model is "
                "as before on all of them. The other rank's error says why."
            )
        self._give_grads_back()

    def settled(self, *, is_finished: bool) -> None:
        """After an exchange that was interrupted, and was rolled back or finished since."""
        if not self.are_any:
            return
        if is_finished:
            insist(lambda: refresh(self._groups))
        else:
            insist(lambda: put_back(self._groups, self._padded))
        self._give_grads_back()

    def _give_grads_back(self) -> None:
        for tensor, grad in self._grads:
            tensor.grad = grad
        self._grads = []

    def _name_of(self, tensor: torch.Tensor) -> str:
        return self._names.get(id(tensor), "a gradient, or a state of an optimizer")

    def _refuse_watched(self, tensors: Iterable[torch.Tensor]) -> None:
        watched = [self._name_of(tensor) for tensor in tensors if weakref.getweakrefs(tensor)]
        if watched:
            raise ConfigError(
                itemized(
                    f"weak references to {len(watched)} sharded tensors are held, and PyTorch "
                    "cannot give such a tensor another dtype (torch.utils.swap_tensors):",
                    watched,
                    "Nothing was changed. Cast before they are taken (a compiled model takes "
                    "some), or before the model is sharded.",
                )
            )


@contextmanager
def together(model_scan: ModelScan) -> Generator[Shards]:
    """Let all ranks that hold parts of a model come through the block, or none.

    Every rank has to enter it. What one raises makes the exchange of the others fail as well.
    """
    vote = Vote(item.tensor for item in model_scan.tensors)
    try:
        yield Shards(model_scan, vote)
    except BaseException:
        if not vote.is_cast:
            insist(lambda: vote.hear(False))
        raise
    if not vote.is_cast and not vote.hear(True):
        raise OtherRankError("the cast failed on another rank, and nothing was changed here.")


class Vote:
    """One vote of all ranks that hold parts of some tensors, mesh by mesh."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        meshes = {t.device_mesh: None for t in tensors if isinstance(t, DTensor)}
        groups: dict[int, tuple[Any, str]] = {}
        for mesh in meshes:
            for dim in range(mesh.ndim):
                if mesh.size(dim) > 1:
                    group = mesh.get_group(dim)
                    groups[id(group)] = group, mesh.device_type
        self._pending = list(groups.values())
        self._is_well = True
        self.is_cast = False

    def hear(self, is_well: bool) -> bool:
        """Say how this rank is, and return whether all are well; goes on where it was stopped."""
        self._is_well = self._is_well and is_well
        while self._pending:
            group, kind = self._pending[0]
            ballot = torch.tensor([int(self._is_well)], device=kind)
            dist.all_reduce(ballot, dist.ReduceOp.MIN, group=group)
            self._pending.pop(0)
            self._is_well = ballot.tolist() == [1]
        self.is_cast = True
        return self._is_well


def insist(function: Callable[[], Any]) -> Any:
    """Call a function that is bound to come through, again and again."""
    for _ in range(_TRIES - 1):
        try:
            return function()
        except BaseException:  # noqa: BLE001 - what interrupted the exchange may do so again
            continue
    return function()
