"""Classes that a module's class is exchanged for: subclasses of it, which run by other backends.

The module stays the same object, with its parameters, buffers, children, hooks and attributes, so
exchanging the class back is all that there is to an inverse. A variant has the name, the module and
the docstring of the class that it is of, since transformers looks classes up by their names.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from automodel_fn.convert._compiled import COMPILE_ATTN
from automodel_fn.convert._experts import GROUPED_EXPERTS
from automodel_fn.convert._fp8_blocks import TE_FP8
from automodel_fn.convert._gates import FAKE_GATE, GATE_PRECISION
from automodel_fn.convert._heads import HEAD_PRECISION
from automodel_fn.convert._linears import LINEAR
from automodel_fn.convert._losses import LOSS
from automodel_fn.convert._masks import ASYNC_MASKS
from automodel_fn.convert._mlps import SWIGLU
from automodel_fn.convert._norms import RMS_NORM
from automodel_fn.convert._ropes import ROPE
from automodel_fn.convert._settings import OWN, SETTINGS, Behaviour, Settings
from automodel_fn.convert._te_attention import TE_ATTENTION

BEHAVIOURS: Mapping[str, Behaviour] = {
    "linear": LINEAR,
    "rms_norm": RMS_NORM,
    "rope_fusion": ROPE,
    "te_attn": TE_ATTENTION,
    "async_masks": ASYNC_MASKS,
    "swiglu": SWIGLU,
    "grouped_experts": GROUPED_EXPERTS,
    "gate_precision": GATE_PRECISION,
    "fake_balanced_gate": FAKE_GATE,
    "lm_head_precision": HEAD_PRECISION,
    "loss": LOSS,
    "compile_attn": COMPILE_ATTN,
    "te_fp8": TE_FP8,
}
"""How each field acts on a class, from the innermost to the outermost."""


def variant(own: type[Any], settings: Mapping[str, str]) -> type[Any]:
    """The class of modules of class `own` with these settings; made once, `own` itself for none.

    Args:
        own: The class.
        settings: Field and choice.
    """
    cls, done = own, ()
    for field, behaviour in BEHAVIOURS.items():
        if field in settings:
            done = (*done, (field, settings[field]))
            cls = _made(cls, own, done, behaviour, behaviour.bases(settings[field]))
    return cls


@functools.cache
def _made(
    below: type[Any],
    own: type[Any],
    settings: Settings,
    behaviour: Behaviour,
    bases: tuple[type[Any], ...],
) -> type[Any]:
    below_reduce: Any = own.__reduce_ex__

    def reduced(self: Any, protocol: Any) -> Any:
        how = below_reduce(self, protocol)
        if type(self) is not made or not isinstance(how, tuple):
            return how
        # A class that was made here cannot be found by its name; the one that it is of can.
        return _unpickled, (own, settings), *how[2:]

    made = type(
        own.__name__,
        (*bases, below),
        {
            "__doc__": own.__doc__,
            "__module__": own.__module__,
            "__qualname__": own.__qualname__,
            "__reduce_ex__": reduced,
            **behaviour.namespace(below, settings[-1][1]),
            SETTINGS: settings,
            OWN: own,
        },
    )
    return made


def _unpickled(own: type[Any], settings: Settings) -> Any:
    made: Any = variant(own, dict(settings))
    return made.__new__(made)
