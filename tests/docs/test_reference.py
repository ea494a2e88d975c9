from __future__ import annotations

import doctest
import inspect
import operator
import re

import pytest

import automodel_fn
from automodel_fn.errors import AutomodelFnError

_DIRECTIVE = re.compile(
    r"^\.\. auto(?:function|class|exception|data):: +automodel_fn\.(?!testing\.)([\w.]+)$", re.M
)


def _public(name):
    """A public name, or those of a public module: they are reached through it."""
    value = getattr(automodel_fn, name)
    return [f"{name}.{inner}" for inner in value.__all__] if inspect.ismodule(value) else [name]


PUBLIC = [inner for name in automodel_fn.__all__ for inner in _public(name)]
_value = operator.attrgetter


def _is_ours(value):
    if inspect.isclass(value):
        return not issubclass(value, AutomodelFnError)
    return inspect.isroutine(value) or hasattr(value, "__wrapped__")


OURS = [name for name in PUBLIC if _is_ours(_value(name)(automodel_fn))]


@pytest.fixture(scope="module")
def documented(root):
    pages = sorted((root / "docs" / "reference").glob("*.md"))
    return [name for page in pages for name in _DIRECTIVE.findall(page.read_text("utf-8"))]


def test_the_reference_documents_every_public_name_once(documented):
    assert sorted(documented) == sorted(PUBLIC)


def test_every_public_function_and_class_of_ours_is_looked_at():
    rest = set(PUBLIC) - set(OURS)
    errors = {name for name in rest if name.endswith("Error")}

    assert rest - errors == {"bf16", "fp16", "fp32"}


def test_every_public_name_has_a_docstring():
    for name in OURS:
        value = _value(name)(automodel_fn)

        assert value.__doc__, name
        assert value.__doc__ not in (object.__doc__, type.__doc__), name


@pytest.mark.parametrize("name", OURS)
def test_a_public_name_shows_an_example(name):
    text = inspect.getdoc(_value(name)(automodel_fn)) or ""

    assert "Example:" in text
    assert doctest.DocTestParser().get_examples(text)


def test_the_errors_say_when_they_are_raised():
    for name in automodel_fn.__all__:
        if name.endswith("Error"):
            assert getattr(automodel_fn, name).__doc__, name


def test_the_changelog_has_the_version(root):
    text = (root / "docs" / "changelog.md").read_text("utf-8")

    assert f"## [{automodel_fn.__version__}]" in text or "## [Unreleased]" in text
