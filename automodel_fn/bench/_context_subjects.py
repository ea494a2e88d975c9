"""What puts a step in force and reads it in a forward: ours, a raw ContextVar, a global flag."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import Context, ContextVar
from typing import Any

import attrs
import torch
from torch import nn

from automodel_fn.bench._loops import Loop
from automodel_fn.step._ambient import current_step, eager_step, step_context
from automodel_fn.step._context import StepContext
from automodel_fn.te._forward import wrapped_forward

LATER = StepContext(False)


class Idle(nn.Module):
    """A module with the forward of Transformer Engine's Linear, which does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(
        self,
        inp: torch.Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool = False,
        fp8_grad: bool = False,
    ) -> torch.Tensor:
        """Give the input back."""
        return inp


@attrs.frozen
class Carrier:
    """One way to carry a step.

    Args:
        enters: Enters and leaves, again and again.
        reads: Reads, again and again.
        forward: A forward that reads, around that of Idle.
        within: Puts first_microbatch=False in force.
    """

    enters: Loop
    reads: Loop = attrs.field(kw_only=True)
    forward: Callable[..., Any] | None = attrs.field(kw_only=True)
    within: Callable[[], Any] = attrs.field(kw_only=True)


def ours(is_by_field: bool) -> Carrier:
    """A scope of a StepContext, or of a field by its name."""

    def enters(calls: int) -> None:
        for _ in range(calls):
            with step_context(LATER):
                pass

    def enters_by_field(calls: int) -> None:
        for _ in range(calls):
            with step_context(first_microbatch=False):
                pass

    def reads(calls: int) -> None:
        for _ in range(calls):
            current_step()

    return Carrier(
        enters_by_field if is_by_field else enters,
        reads=reads,
        forward=wrapped_forward(Idle.forward, "linear", eager_step, "Idle"),
        within=lambda: step_context(LATER),
    )


_raw: ContextVar[StepContext] = ContextVar("raw", default=LATER)


def raw_enters(calls: int) -> None:
    """Set a ContextVar and reset it: the least that a scope must do.

    In a context of its own: where another variable is set as well, it takes longer.
    """
    Context().run(_raw_enters, calls)


def _raw_enters(calls: int) -> None:
    for _ in range(calls):
        token = _raw.set(LATER)
        _raw.reset(token)


def raw(is_by_field: bool) -> Carrier:
    """A bare ContextVar, which is invisible where a backward runs, and in compiled code."""

    def reads(calls: int) -> None:
        for _ in range(calls):
            _raw.get()

    return Carrier(raw_enters, reads=reads, forward=None, within=_set_raw)


@contextmanager
def _set_raw() -> Generator[None]:
    token = _raw.set(LATER)
    yield
    _raw.reset(token)


def nemo_utils() -> Any:
    """The peer's module."""
    import nemo_automodel.components.models.common.utils as utils  # pyright: ignore[reportMissingImports] - a peer

    return utils


def nemo(is_by_field: bool) -> Carrier:
    """A module global, set and set back, and the peer's own wrapper, which its patch makes."""
    utils = nemo_utils()
    put, get = utils.set_is_first_microbatch, utils.get_is_first_microbatch

    def enters(calls: int) -> None:
        for _ in range(calls):
            put(False)
            put(None)

    def reads(calls: int) -> None:
        for _ in range(calls):
            get()

    @contextmanager
    def within() -> Generator[None]:
        put(False)
        yield
        put(None)

    return Carrier(enters, reads=reads, forward=_peers_forward(utils), within=within)


def _peers_forward(utils: Any) -> Callable[..., Any]:
    """What the peer puts in the place of Linear's forward; here Idle is the Linear it finds."""
    package = "transformer_engine.pytorch"
    places = {"linear": "Linear", "grouped_linear": "GroupedLinear", "rmsnorm": "RMSNorm"}
    stand_ins = {place: type(name, (Idle,), {}) for place, name in places.items()}
    for name in ("transformer_engine", package, f"{package}.module"):
        sys.modules[name] = types.ModuleType(name)
    for place, cls in stand_ins.items():
        module: Any = types.ModuleType(f"{package}.module.{place}")
        setattr(module, places[place], cls)
        sys.modules[module.__name__] = module
    utils._make_lazy_te_patcher()()
    return vars(stand_ins["linear"])["forward"]
