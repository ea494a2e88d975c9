"""Models whose causal masks are made without waiting for the device.

Where no cache and no mask is given, transformers looks whether position ids start anew somewhere,
as those of packed sequences do, and the host waits for the answer. Where no position ids are given
either, they are made to count up, and the answer is known.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

from torch import nn

from automodel_fn.convert._around import Around
from automodel_fn.convert._overlay import innermost, names_in, with_globals
from automodel_fn.convert._parts import Part
from automodel_fn.convert._rules import Rule
from automodel_fn.convert._settings import Behaviour, Namespace

_POSITIONS = "position_ids"
_COUNTING = re.compile(r"torch\.arange\(\w+(\.shape\[\d\])?, device=\w+\.device\)( \+ \w+)?")
_AS_BATCH = f"{_POSITIONS}.unsqueeze(0)"


def _mask_functions(cls: type[Any]) -> dict[str, Callable[..., Any]]:
    """The functions that the forward of a class makes masks with, of position ids among others."""
    function = innermost(cls.forward)
    known = function.__globals__ if function else {}
    named = {
        name: known[name]
        for name in sorted(names_in(cls))
        if name.startswith("create_") and name.endswith("_mask") and callable(known.get(name))
    }
    return {name: made for name, made in named.items() if _POSITIONS in _parameters(made)}


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _without_positions(function: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def made(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.arguments.pop(_POSITIONS, None)
        return function(*given.args, **given.kwargs)

    return made


def _namespace(below: type[Any], choice: str) -> Namespace:
    own: Any = below.forward
    functions = _mask_functions(below)
    counting = with_globals(
        own, {name: _without_positions(function) for name, function in functions.items()}
    )
    # Without the module itself.
    place = _parameters(own).index(_POSITIONS) - 1

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        positions = args[place] if len(args) > place else kwargs.get(_POSITIONS)
        return (counting if positions is None else own)(self, *args, **kwargs)

    return {"forward": forward}


def counts_up(cls: type[nn.Module]) -> bool:
    """Whether the forward of a class, given no position ids, makes ones that count up by one.

    That is read in its source, which has to say so in the way in which nearly all models do.
    """
    function = innermost(cls.forward)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))) if function else None
    # It was made at run time, or its file is gone.
    except (OSError, TypeError, SyntaxError):
        tree = None
    if tree is None:
        return False
    everywhere = _assigned(tree)
    where_none = [
        value
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == f"{_POSITIONS} is None"
        for each in node.body
        for value in _assigned(each)
    ]
    if everywhere != where_none or len(everywhere) != 2:
        return False
    return bool(_COUNTING.fullmatch(everywhere[0])) and everywhere[1] == _AS_BATCH


def _assigned(tree: ast.AST) -> list[str]:
    """What is assigned to the position ids, in the order of the source; "" for nothing."""
    return [
        ast.unparse(node.value) if node.value else ""
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr)
        if _POSITIONS in _targets(node)
    ]


def _targets(node: ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [name.id for each in targets for name in ast.walk(each) if isinstance(name, ast.Name)]


def _makes_masks(part: Part, around: Around) -> bool:
    return bool(_mask_functions(part.own))


def _refusal(part: Part, around: Around) -> str:
    if _POSITIONS not in _parameters(part.own.forward):
        return "its forward takes no position ids"
    return "" if counts_up(part.own) else "its forward makes position ids in a way of its own"


ASYNC_MASKS = Behaviour(_namespace)
ASYNC_MASKS_RULE = Rule(
    "async_masks",
    own="False",
    is_candidate=_makes_masks,
    refusal=_refusal,
    remark=": where no position_ids are given, masks take them to count up, as they do",
)
