"""The errors that this library raises on purpose.

Every one is an `AutomodelFnError`, and also the builtin that a caller would expect to catch. A
message names the value, what was expected, what was found and what to do; where several things are
wrong at once they are collected and raised together, before anything is changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_LINES_SHOWN = 20


class AutomodelFnError(Exception):
    """Base of every error of this library."""


class ConfigError(AutomodelFnError, ValueError):
    """An argument or a declaration is not what it must be."""


class StalePlanError(AutomodelFnError, RuntimeError):
    """A plan, report or snapshot no longer fits the model; the model was not changed."""


class ScopeError(AutomodelFnError, RuntimeError):
    """A step scope was left out of order, twice, or in another thread than it was entered in."""


class PartialCastError(AutomodelFnError, RuntimeError):
    """A cast could neither be finished nor undone; the message lists what is left to do."""


class OtherRankError(AutomodelFnError, RuntimeError):
    """Another rank could not do its part; on this one everything is as it was before."""


class BackendUnavailableError(AutomodelFnError, ImportError):
    """What was asked for by name cannot run here; the message says what would."""


class BenchmarkError(AutomodelFnError, RuntimeError):
    """A benchmark could not be finished; the message says which measurement failed, and how."""


class PatchError(AutomodelFnError, RuntimeError):
    """A class is not in the state in which our patch left it."""


class StaleWeightError(AutomodelFnError, RuntimeError):
    """A quantized weight was to be reused after the weight that it was made from had changed."""


def itemized(head: str, items: Iterable[str], advice: str = "") -> str:
    """A message of several lines: a head, one indented line an item, and what to do.

    Long lists are cut after 20 items, and the cut is counted.

    Example:
        >>> print(itemized("2 of 3 differ", ["a: x", "b: y"], "Plan again."))
        2 of 3 differ
          a: x
          b: y
        Plan again.
    """
    lines = list(items)
    shown = [f"  {line}" for line in lines[:_LINES_SHOWN]]
    if len(lines) > _LINES_SHOWN:
        shown.append(f"  ... and {len(lines) - _LINES_SHOWN} more")
    return "\n".join([head, *shown, *([advice] if advice else [])])
