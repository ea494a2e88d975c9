"""Which classes of the installed transformers declare fp32 pins, found in its sources."""

import functools
import importlib
import inspect
from pathlib import Path

import transformers
from transformers import PreTrainedModel

DECLARING = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
SOURCES = Path(transformers.__file__).parent


@functools.cache
def declaring_classes():
    """Each class that declares keywords in its own body, at least one; by file and in order."""
    found = []
    for file in sorted(SOURCES.rglob("modeling_*.py")):
        if DECLARING[0] in file.read_text("utf-8"):
            found += (kind for kind in classes_of(_module_of(file)) if _declares(kind))
    return tuple(found)


def classes_of(module):
    """The model classes that a module defines."""
    return tuple(
        kind
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, PreTrainedModel)
        if kind.__module__ == module.__name__ and kind.__name__ == name
    )


def family_of(kind):
    """The folder of a class among the models of transformers."""
    return kind.__module__.split(".")[-2]


def _declares(kind):
    return any(vars(kind).get(attribute) for attribute in DECLARING)


def _module_of(file):
    dotted = file.relative_to(SOURCES.parent).with_suffix("").parts
    return importlib.import_module(".".join(dotted))
