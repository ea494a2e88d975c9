"""Which values a backend's fields have, what "auto" may become, and what goes together."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from itertools import product
from typing import Any, Literal, get_args

import attrs

from automodel_fn.backend._fp8 import TEFp8Config

AUTO = "auto"
Attention = Literal["auto", "te", "sdpa", "flex", "eager", "tilelang"]
Linear = Literal["auto", "torch", "te"]
Norm = Literal["torch", "torch_fp32", "te"]
Swiglu = Literal["auto", "torch", "fused", "recomputed"]
Fused = Literal["auto", "torch", "fused"]
HeadPrecision = Literal["fp32", "bf16x3", "bf16"]
Experts = Literal["auto", "torch", "te", "gmm", "torch_mm", "torch_mm_mxfp8"]
Dispatcher = Literal["auto", "torch", "deepep", "hybridep", "uccl_ep"]

HEAD_PRECISIONS = get_args(HeadPrecision)

CHOICES: Mapping[str, tuple[str, ...]] = {
    "attn": get_args(Attention),
    "linear": get_args(Linear),
    "rms_norm": get_args(Norm),
    "experts": get_args(Experts),
    "dispatcher": get_args(Dispatcher),
    "swiglu": get_args(Swiglu),
    "loss": get_args(Fused),
}
PREFERRED: Mapping[str, tuple[Any, ...]] = {
    "attn": ("sdpa", "te"),
    "linear": ("te", "torch"),
    "rope_fusion": (True, False),
    "async_masks": (True, False),
    "swiglu": ("fused", "torch"),
    "loss": ("fused", "torch"),
    "dispatcher": ("deepep", "uccl_ep", "torch"),
    # Those of Transformer Engine come last: they are for FP8, which needs something to act on.
    "experts": ("torch_mm", "torch", "te"),
}
"""What "auto" becomes: the first that can run and goes with the rest."""

RUNNABLE = (
    "attn",
    "linear",
    "rms_norm",
    "rope_fusion",
    "async_masks",
    "swiglu",
    "loss",
    "experts",
    "dispatcher",
    "te_fp8",
)
"""The fields whose values need something of the machine."""

Values = Mapping[str, Any]


@attrs.frozen
class Rule:
    """What must hold between several fields.

    Args:
        fields: Which fields it is about.
        text: What is expected, and what to do where it is not so.
        holds: Whether it is so.
    """

    fields: tuple[str, ...]
    text: str = attrs.field(kw_only=True)
    holds: Callable[[Values], bool] = attrs.field(kw_only=True, eq=False, repr=False)

    def complaint(self, values: Values) -> str:
        """What was found and what was expected, in one line."""
        found = ", ".join(f"{name}={value_text(values[name])}" for name in self.fields)
        return f"{found}: {self.text}"


def _compiled(field: str, others: str, *opaque: Any) -> Rule:
    return Rule(
        ("compile_attn", field),
        text=f"compile_attn=True traces the whole attention module, so it needs {others}",
        holds=lambda values: not values["compile_attn"] or values[field] not in opaque,
    )


RULES = (
    Rule(
        ("fake_gate_noise", "fake_balanced_gate"),
        text="noise is added by the fake gate only; set fake_balanced_gate=True or leave it at 0",
        holds=lambda values: values["fake_balanced_gate"] or values["fake_gate_noise"] == 0,
    ),
    Rule(
        ("experts", "dispatcher"),
        text="experts='torch' needs dispatcher='torch'; set it, or experts='torch_mm'",
        holds=lambda values: values["experts"] != "torch" or values["dispatcher"] == "torch",
    ),
    Rule(
        ("te_fp8", "linear", "experts"),
        text="FP8 needs modules of Transformer Engine to act on; "
        "set linear='te' or experts='te', or te_fp8=None",
        holds=lambda values: (
            values["te_fp8"] is None or "te" in (values["linear"], values["experts"])
        ),
    ),
    _compiled("attn", "attn='sdpa', 'flex' or 'eager'", "te", "tilelang"),
    _compiled("linear", "linear='torch'", "te"),
    _compiled("rms_norm", "rms_norm='torch' or 'torch_fp32'", "te"),
)


def broken(values: Values, unjudged: Container[str] = ()) -> tuple[Rule, ...]:
    """The rules that these values break; not those about a field that is not to be judged."""
    return tuple(
        rule
        for rule in RULES
        if not any(name in unjudged for name in rule.fields) and not rule.holds(values)
    )


def completions(
    values: Values, allowed: Mapping[str, Iterable[Any]] = PREFERRED
) -> Iterator[dict[str, Any]]:
    """Every way to replace "auto" by a value that is allowed, the preferred ones first.

    Example:
        >>> [each["linear"] for each in completions({"attn": "te", "linear": "auto"})]
        ['te', 'torch']
    """
    names = [name for name in PREFERRED if values.get(name) == AUTO]
    for chosen in product(*(allowed[name] for name in names)):
        yield {**values, **dict(zip(names, chosen, strict=True))}


def contradictions(values: Values, unjudged: Container[str] = ()) -> tuple[str, ...]:
    """What no choice for the fields that are "auto" can make right; () if some choice can."""
    # They are told as they were asked for: what "auto" became on trial, nobody has written.
    return tuple(rule.complaint(values) for rule in in_the_way(completions(values), unjudged))


def in_the_way(candidates: Iterable[Values], unjudged: Container[str] = ()) -> tuple[Rule, ...]:
    """The rules that the best of several candidates break; () if one of them breaks none.

    Where "auto" could become several things and each breaks another rule, all of these are told:
    one alone would send the caller from one error to the next.
    """
    found = set[tuple[Rule, ...]]()
    for values in candidates:
        rules = broken(values, unjudged)
        if not rules:
            return ()
        found.add(rules)
    least = min(map(len, found), default=0)
    told = {rule for rules in found if len(rules) == least for rule in rules}
    return tuple(rule for rule in RULES if rule in told)


def value_text(value: Any) -> str:
    """A value as it is written in an error.

    Example:
        >>> value_text("te"), value_text(True)
        ("'te'", 'True')
    """
    return repr(value.kind if isinstance(value, TEFp8Config) else value)
