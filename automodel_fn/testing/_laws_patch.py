"""Laws of the Transformer Engine patch: it can be undone, and it passes the step of its scope."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import attrs
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from automodel_fn.step._ambient import current_step, step_context
from automodel_fn.step._context import StepContext
from automodel_fn.te._classes import TEClasses
from automodel_fn.te._patch import PatchHandle, patch_classes
from automodel_fn.testing._facts import demand
from automodel_fn.testing._stand_ins import te_stand_ins
from automodel_fn.testing._twin import bits_of

PatchEvent = StepContext | Literal["leave", "change", "forward", "checkpoint", "backward"] | bool
_Own = dict[str, Any]
_TINY = 4


def check_patch_reversible(
    classes: TEClasses,
    actions: Iterable[int | None] = (None, None, 0, None, 1, 0),
    outputs: Callable[[], Sequence[torch.Tensor]] | None = None,
) -> None:
    """Law: whatever the order of handles, the classes are in the end, to the object, as before.

    In between each of them is wrapped exactly while a handle is left, and then once.

    Args:
        classes: The classes to patch: Transformer Engine's, or stand-ins. None may be patched.
        actions: What is done, in order: None takes a handle, and a number gives back one of those
            that are left, counted from the oldest and round again. The rest are given back last.
        outputs: Runs modules of these classes, and gives them `is_first_microbatch`: what it
            returns has the same bits with the patch and without, whatever the step.

    Raises:
        AssertionError: It does not hold.

    Example:
        >>> from automodel_fn.testing import te_stand_ins
        >>> classes = te_stand_ins()
        >>> layer = classes.linear(2, 2)
        >>> def outputs():
        ...     return [layer(torch.ones(1, 2), is_first_microbatch=None)]
        >>> check_patch_reversible(classes, [None, None, 0, None, 1], outputs)
    """
    before, plain = _own_of(classes), _bits(outputs)
    wrapped: list[_Own] = []
    handles: list[PatchHandle] = []
    try:
        for action in actions:
            if action is None:
                handles.append(patch_classes(classes, current_step))
            elif handles:
                handles.pop(action % len(handles)).remove()
            wrapped = (wrapped or _own_of(classes)) if handles else []
            _demand_wrapped(classes, before, wrapped)
            for first in (None, True, False):
                with step_context(first_microbatch=first):
                    demand(
                        all(map(torch.equal, _bits(outputs), plain)),
                        f"first_microbatch={first} changes an output with an explicit argument",
                    )
    finally:
        for handle in handles:
            handle.remove()
    _demand_wrapped(classes, before, [])


def check_patch_passes_step(
    events: Iterable[PatchEvent | None], classes: TEClasses | None = None
) -> None:
    """Law: a patched forward is given exactly the step of its scope, and its caller's word wins.

    A `Linear` that keeps its quantized weight runs through the events beside a slow model of that
    rule, which is told the step by a plain list. Each output, and each count, must be the model's;
    a recompute must be given what its forward was given.

    Args:
        events: What happens, in order. A StepContext: its scope is entered. "leave": the innermost
            is left, if there is one. "change": the weight changes. "forward": a call without the
            argument. None, True or False: a call with it. "checkpoint": a call without it whose
            activations are recomputed in the next "backward".
        classes: Of the kind that `te_stand_ins` gives; new ones if None.

    Raises:
        AssertionError: It does not hold.

    Example:
        >>> scope = StepContext(True)
        >>> check_patch_passes_step([scope, "forward", "change", "leave", "forward", None])
    """
    stand_ins = te_stand_ins() if classes is None else classes
    with patch_classes(stand_ins, current_step), ExitStack() as left:
        made = _Run(stand_ins.linear)
        left.callback(made.leave_all)
        for event in events:
            made.happens(event)
        made.happens("backward")


@attrs.define
class _Cache:
    """The rule of the kept weight, over numbers of versions in the place of weights."""

    version: int = 0
    kept: int | None = None
    count: int = 0

    def used(self, first: bool | None) -> int:
        """The version that a call with `first` computes with."""
        used = self.kept if first is False else None
        if used is None:
            used, self.count = self.version, self.count + 1
        if first is not None:
            self.kept = used
        return used


class _Run:
    """A layer of the patched class, and the model of it."""

    def __init__(self, cls: type[Any]) -> None:
        self.layer, self.cache = cls(_TINY, _TINY), _Cache()
        self.weights = [self.layer.weight.detach().clone()]
        self.scopes: list[tuple[step_context, StepContext]] = []
        self.pending: list[tuple[torch.Tensor, bool | None]] = []
        self.inp = torch.linspace(-1, 1, 2 * _TINY).view(2, _TINY)

    def happens(self, event: PatchEvent | None) -> None:
        """Let one event happen to both, and compare them."""
        step = self.scopes[-1][1].first_microbatch if self.scopes else None
        if isinstance(event, StepContext):
            scope = step_context(event)
            scope.__enter__()
            self.scopes.append((scope, event))
        elif event == "leave":
            self._leave()
        elif event == "change":
            self._change()
        elif event == "backward":
            self._backward()
        elif event == "forward":
            self._compare(self.layer(self.inp), step)
        elif event == "checkpoint":
            inp = self.inp.clone().requires_grad_()
            out: Any = checkpoint(self.layer, inp, use_reentrant=False)
            self._compare(out, step)
            self.pending.append((out, step))
        else:
            demand(event in (None, True, False), f"{event!r} is no event")
            self._compare(self.layer(self.inp, is_first_microbatch=event), event)

    def leave_all(self) -> None:
        while self.scopes:
            self._leave()

    def _leave(self) -> None:
        if self.scopes:
            self.scopes.pop()[0].__exit__(None, None, None)

    def _change(self) -> None:
        with torch.no_grad():
            self.layer.weight.add_(1)
        self.cache.version += 1
        self.weights.append(self.layer.weight.detach().clone())

    def _backward(self) -> None:
        for out, first in self.pending:
            out.sum().backward()
            self.cache.used(first)
            self._demand_state(f"a recompute of a forward in first_microbatch={first}")
        self.pending.clear()

    def _compare(self, out: torch.Tensor, first: bool | None) -> None:
        used = self.weights[self.cache.used(first)]
        rounded = used.to(torch.float8_e4m3fn).to(used.dtype)
        expected = F.linear(self.inp, rounded, self.layer.bias)
        where = f"a forward in first_microbatch={first}"
        demand(torch.equal(out, expected), f"{where} used another weight than the rule says")
        self._demand_state(where)

    def _demand_state(self, where: str) -> None:
        found = self.layer.num_quantizations
        demand(
            found == self.cache.count,
            f"{where}: quantized {found} times, the rule says {self.cache.count}",
        )


def _own_of(classes: TEClasses) -> list[_Own]:
    return [dict(vars(cls)) for _, cls in classes.items()]


def _bits(outputs: Callable[[], Sequence[torch.Tensor]] | None) -> list[torch.Tensor]:
    return [] if outputs is None else [bits_of(out) for out in outputs()]


def _demand_wrapped(classes: TEClasses, before: list[_Own], wrapped: list[_Own]) -> None:
    """Each class must be as before the patch, or wrapped and as the first handle found it."""
    for place, (_, cls) in enumerate(classes.items()):
        now, own = dict(vars(cls)), before[place]
        if not wrapped:
            demand(_is_same(now, own), f"without a handle {cls.__name__} is not as it was before")
            continue
        forward, original = now.pop("forward", None), own.get("forward")
        others = {name: value for name, value in own.items() if name != "forward"}
        demand(_is_same(now, others), f"the patch changed more of {cls.__name__} than its forward")
        is_wrapped = forward is not None and forward is not original
        demand(is_wrapped, f"with a handle left {cls.__name__} is not wrapped")
        is_once = forward is wrapped[place]["forward"]
        demand(is_once, f"with a handle left {cls.__name__} was wrapped again")


def _is_same(own: _Own, other: _Own) -> bool:
    """The same names in the same order, for the same objects."""
    return [*own] == [*other] and all(value is other[name] for name, value in own.items())
