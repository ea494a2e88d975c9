"""The wrapped forwards: pure functions of a forward and a reader of the step.

A wrapped forward keeps its signature and passes every argument through as it came. It adds
`is_first_microbatch` where the caller gave none, not even None, and the step has one.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn import Parameter

from automodel_fn.errors import PatchError
from automodel_fn.step._context import StepContext
from automodel_fn.te._cache import Told, forget
from automodel_fn.te._classes import FIRST_MICROBATCH, takes_step
from automodel_fn.te._shapes import SHAPE_RULES, ShapeRule
from automodel_fn.te._unallocated import is_tensor_abstract

Forward = Callable[..., Any]
StepReader = Callable[[], StepContext]
_NOT_GIVEN: Any = object()


def with_step(
    forward: Forward,
    read_step: StepReader,
    name: str,
    told: Told | None = None,
    rule: ShapeRule | None = None,
) -> Forward:
    """A forward that takes `is_first_microbatch` from the step unless its caller gives it.

    Compiled code passes nothing: a bool costs a graph break in Transformer Engine 2.20.

    Args:
        forward: The unbound forward of a class.
        read_step: Gives the step in force; called once a forward, in eager code only.
        name: What the forward is called in an error.
        told: What a module is told in a microbatch that is the first one, or is not; None: so.
        rule: As in `with_shape_rule`; done here too, since one function more is one call more.

    Raises:
        PatchError: The forward has no parameter of that name.
    """
    position = _position(forward, FIRST_MICROBATCH)
    if position is None:
        raise PatchError(
            f"{name}.forward has no parameter {FIRST_MICROBATCH}, found {_described(forward)}; "
            "expected Transformer Engine 2.0 or newer, and no wrapper that hides the signature."
        )
    shaped = forward if rule is None else with_shape_rule(forward, rule)
    first_parameter = _first_parameter(forward)

    @wraps(forward)
    def stepping(self: nn.Module, inp: Any = _NOT_GIVEN, /, *args: Any, **kwargs: Any) -> Any:
        # Most calls give the input by position and nothing else: passed on as it is, since to pack
        # and unpack arguments takes as long as to read the step.
        is_plain = True
        if args or kwargs or inp is _NOT_GIVEN:
            is_plain = False
            args = args if inp is _NOT_GIVEN else (inp, *args)
            inp = args[0] if args else kwargs.get(first_parameter)
        if is_dynamo_compiling():
            return shaped(self, inp) if is_plain else shaped(self, *args, **kwargs)
        kind = type(inp)
        # Whatever is not an ordinary tensor with values: its shape may be all that is wanted.
        if (kind is not Tensor and kind is not Parameter) or inp.is_meta:
            if is_compiling():
                return shaped(self, inp) if is_plain else shaped(self, *args, **kwargs)
            if rule is not None and isinstance(inp, Tensor) and is_tensor_abstract(inp):
                return rule(self, inp)
        if not is_plain and (len(args) > position or FIRST_MICROBATCH in kwargs):
            return forward(self, *args, **kwargs)
        first = read_step().first_microbatch
        if first is None:
            return forward(self, inp) if is_plain else forward(self, *args, **kwargs)
        if told is not None:
            first = told(self, first)
        try:
            if is_plain:
                return forward(self, inp, is_first_microbatch=first)
            return forward(self, *args, **kwargs, is_first_microbatch=first)
        except BaseException:
            forget(self)
            raise

    return stepping


def with_shape_rule(forward: Forward, rule: ShapeRule) -> Forward:
    """A forward that answers an input without values by `rule` and does not run.

    That is one that never had any (meta, fake); of one that was freed an answer would hide the
    mistake.

    Args:
        forward: The unbound forward of a class; its first argument is the input.
        rule: Gives the outputs for a module and an input.
    """
    first = _first_parameter(forward)

    @wraps(forward)
    def shaped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inp = args[0] if args else kwargs.get(first)
        if isinstance(inp, Tensor) and is_tensor_abstract(inp):
            return rule(self, inp)
        return forward(self, *args, **kwargs)

    return shaped


def wrapped_forward(
    forward: Forward,
    field: str,
    read_step: StepReader,
    name: str,
    told: Told | None = None,
) -> Forward:
    """The forward of the class of a field of TEClasses, as the patch makes it.

    Args:
        forward: The unbound forward.
        field: Which of the classes it is of.
        read_step: Gives the step in force.
        name: What the class is called in an error.
        told: What a module is told in a microbatch that is the first one, or is not; None: so.

    Raises:
        PatchError: It should take `is_first_microbatch` and does not.
    """
    rule = SHAPE_RULES.get(field)
    if takes_step(field):
        return with_step(forward, read_step, name, told, rule)
    return forward if rule is None else with_shape_rule(forward, rule)


def _first_parameter(forward: Forward) -> str:
    return next(iter(list(inspect.signature(forward).parameters)[1:]), "")


def _position(forward: Forward, parameter: str) -> int | None:
    """Where among the positional arguments after self a parameter stands."""
    parameters = inspect.signature(forward).parameters
    if parameter not in parameters:
        return None
    if parameters[parameter].kind is inspect.Parameter.KEYWORD_ONLY:
        return sys.maxsize
    return list(parameters).index(parameter) - 1


def _described(forward: Forward) -> str:
    return f"{getattr(forward, '__qualname__', forward)}{inspect.signature(forward)}"
