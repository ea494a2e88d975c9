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
    """Law: a patched forward is given the step of its scope, and uses the weight as it is.

    Its caller's word wins. A `Linear` that keeps its quantized weight runs through the events
    beside a slow model of that rule, which is told the step by a plain list, and compares versions.
    Each output, and each count, must be the model's; a recompute must be given what its forward
    was.

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
    known: int | None = None
    microbatch: int | None = None
    count: int = 0

    def given(self, first: bool | None) -> int:
        """The version that a call computes with whose caller gives `first`."""
        used = self.kept if first is False else None
        if used is None:
            used, self.count = self.version, self.count + 1
        if first is not None:
            self.kept = used
        return used

    def stepped(self, first: bool | None, microbatch: int | None) -> int:
        """The version that a call computes with in a microbatch, or in none if it is a recompute.

        A second call in a first microbatch is one in a later one; there, what is kept is dropped
        if it is not known to be of the weight as it is.
        """
        is_first = first and (microbatch is None or microbatch != self.microbatch)
        if is_first and microbatch is not None:
            self.microbatch = microbatch
        if first is not None:
            if not is_first and self.known != self.version:
                self.kept = None
            self.known = self.version
        return self.given(first if first is None else bool(is_first))


class _Run:
    """A layer of the patched class, and the model of it."""

    def __init__(self, cls: type[Any]) -> None:
        self.layer, self.cache = cls(_TINY, _TINY), _Cache()
        self.weights = [self.layer.weight.detach().clone()]
        self.scopes: list[tuple[step_context, StepContext, int]] = []
        self.num_scopes = 0
        self.pending: list[tuple[torch.Tensor, bool | None]] = []
        self.inp = torch.linspace(-1, 1, 2 * _TINY).view(2, _TINY)

    def happens(self, event: PatchEvent | None) -> None:
        """Let one event happen to both, and compare them."""
        step = self.scopes[-1][1].first_microbatch if self.scopes else None
        microbatch = self.scopes[-1][2] if self.scopes else None
        if isinstance(event, StepContext):
            scope = step_context(event)
            scope.__enter__()
            self.num_scopes += 1
            self.scopes.append((scope, event, self.num_scopes))
        elif event == "leave":
            self._leave()
        elif event == "change":
            self._change()
        elif event == "backward":
            self._backward()
        elif event == "forward":
            self._compare(self.layer(self.inp), self.cache.stepped(step, microbatch), step)
        elif event == "checkpoint":
            inp = self.inp.clone().requires_grad_()
            out: Any = checkpoint(self.layer, inp, use_reentrant=False)
            self._compare(out, self.cache.stepped(step, microbatch), step)
            self.pending.append((out, step))
        else:
            demand(event in (None, True, False), f"{event!r} is no event")
            out = self.layer(self.inp, is_first_microbatch=event)
            self._compare(out, self.cache.given(event), event)

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
            self.cache.stepped(first, None)
            self._demand_state(f"a recompute of a forward in first_microbatch={first}")
        self.pending.clear()

    def _compare(self, out: torch.Tensor, version: int, first: bool | None) -> None:
        used = self.weights[version]
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
