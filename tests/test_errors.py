import pickle

import pytest

import automodel_fn
from automodel_fn import errors
from automodel_fn.errors import AutomodelFnError, itemized

BUILTINS = {
    "ConfigError": ValueError,
    "StalePlanError": RuntimeError,
    "StaleWeightError": RuntimeError,
    "ScopeError": RuntimeError,
    "PartialCastError": RuntimeError,
    "OtherRankError": RuntimeError,
    "BackendUnavailableError": ImportError,
    "BenchmarkError": RuntimeError,
    "PatchError": RuntimeError,
}


def test_no_error_is_missing_here():
    kinds = [value for value in vars(errors).values() if isinstance(value, type)]
    assert {kind.__name__ for kind in kinds} == {*BUILTINS, "AutomodelFnError"}


@pytest.mark.parametrize("name", BUILTINS)
def test_an_error_is_of_the_library_and_also_a_builtin(name):
    kind = getattr(automodel_fn, name)
    assert issubclass(kind, AutomodelFnError)
    assert issubclass(kind, BUILTINS[name])
    assert kind is getattr(errors, name)


@pytest.mark.parametrize("name", BUILTINS)
def test_a_message_is_kept_also_by_pickle(name):
    error = pickle.loads(pickle.dumps(getattr(errors, name)("x=1 must be 2.")))
    assert type(error) is getattr(errors, name)
    assert str(error) == "x=1 must be 2."


def test_the_base_is_no_builtin_that_is_caught_by_chance():
    assert AutomodelFnError.__mro__ == (AutomodelFnError, Exception, BaseException, object)


def test_a_list_is_indented_between_head_and_advice():
    assert itemized("2 differ", ["a", "b"], "Plan again.") == "2 differ\n  a\n  b\nPlan again."


def test_without_advice_or_items_there_are_no_empty_lines():
    assert itemized("none", []) == "none"
    assert itemized("one", ["a"]) == "one\n  a"


@pytest.mark.parametrize(("count", "tail"), [(20, "  19"), (21, "  ... and 1 more")])
def test_a_list_is_cut_after_20_items_and_the_cut_counted(count, tail):
    lines = itemized("head", map(str, range(count))).splitlines()
    assert lines[:21] == ["head", *(f"  {index}" for index in range(20))]
    assert lines[-1] == tail


def test_the_advice_follows_a_cut_list():
    lines = itemized("head", (str(index) for index in range(100)), "Do.").splitlines()
    assert lines[-2:] == ["  ... and 80 more", "Do."]
