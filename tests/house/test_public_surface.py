from __future__ import annotations

import importlib
import inspect
import types

import pytest

import automodel_fn
from automodel_fn import errors
from automodel_fn.errors import AutomodelFnError

# Its functions have names that mean something only behind its own: build.linear.
PUBLIC_MODULES = {"build"}


def _constants_classes_functions(name):
    return not name.isupper(), not name[0].isupper(), name


def _areas(package):
    return sorted(door.parent.name for door in package.glob("*/__init__.py"))


def test_the_public_names_are_sorted():
    assert automodel_fn.__all__ == sorted(
        set(automodel_fn.__all__), key=_constants_classes_functions
    )


def test_the_public_names_are_all_that_the_package_shows():
    shown = {
        name
        for name, value in vars(automodel_fn).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }

    assert shown | PUBLIC_MODULES == set(automodel_fn.__all__)
    assert shown & PUBLIC_MODULES == set()


def test_a_public_module_is_reached_by_importing_the_package():
    for name in PUBLIC_MODULES:
        assert vars(automodel_fn)[name] is importlib.import_module(f"automodel_fn.{name}")


def test_every_error_is_public():
    kinds = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, AutomodelFnError)
    }

    assert kinds <= set(automodel_fn.__all__)


@pytest.mark.parametrize("area", ["step", "cast"])
def test_what_steps_and_casts_offer_is_public(area):
    door = importlib.import_module(f"automodel_fn.{area}")

    assert set(door.__all__) <= set(automodel_fn.__all__)


def test_every_door_lists_what_it_opens_to(package):
    for area in _areas(package):
        door = importlib.import_module(f"automodel_fn.{area}")
        listed = list(door.__all__)

        assert listed == sorted(set(listed), key=_constants_classes_functions), area
        assert [name for name in listed if not hasattr(door, name)] == [], area
        assert door.__doc__, area


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("automodel_fn")
    except PackageNotFoundError:
        pytest.skip("automodel_fn is on the path, but not installed")
    assert automodel_fn.__version__ == installed
