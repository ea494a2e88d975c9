from __future__ import annotations

import ast
from pathlib import Path

import attrs
import pytest

import automodel_fn

PACKAGE = Path(automodel_fn.__file__).resolve().parent


@attrs.frozen
class Source:
    path: str
    text: str = attrs.field(repr=False)
    tree: ast.Module = attrs.field(repr=False)

    @property
    def module(self):
        parts = self.path.removesuffix(".py").split("/")
        return ".".join(["automodel_fn", *(part for part in parts if part != "__init__")])

    @property
    def room(self):
        return self.path.partition("/")[0].removesuffix(".py")

    @property
    def is_door(self):
        return self.path.endswith("__init__.py")


@pytest.fixture(scope="session")
def package():
    return PACKAGE


@pytest.fixture(scope="session")
def sources():
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        found.append(Source(file.relative_to(PACKAGE).as_posix(), text, ast.parse(text)))
    return tuple(found)
