import numpy as np
import pytest

from automodel_fn import ConfigError, ScopeError, StepContext, current_step, step_context

OFF = StepContext()
FIRST = StepContext(True)
LATER = StepContext(False)
LAST = StepContext(False, optim_step=True)


def leave(scope):
    scope.__exit__(None, None, None)


def entered(**fields):
    scope = step_context(**fields)
    scope.__enter__()
    return scope


def suspended(**fields):
    def generate():
        with step_context(**fields):
            yield

    generator = generate()
    next(generator)
    return generator


def test_outside_of_every_scope_the_step_is_off():
    assert current_step() == OFF


@pytest.mark.parametrize("step", [FIRST, LATER, LAST, OFF])
def test_a_scope_gives_and_shows_its_step_and_ends(step):
    with step_context(step) as given:
        assert given == current_step() == step
    assert current_step() == OFF


def test_fields_that_are_not_given_are_inherited():
    with step_context(first_microbatch=True):
        with step_context(optim_step=True):
            assert current_step() == StepContext(True, optim_step=True)
            with step_context(first_microbatch=False), step_context():
                assert current_step() == LAST
        assert current_step() == FIRST


def test_a_step_replaces_all_fields():
    with step_context(first_microbatch=True, optim_step=True), step_context(StepContext(False)):
        assert current_step() == LATER


def test_an_explicit_none_is_off_and_does_not_inherit():
    with step_context(first_microbatch=True, optim_step=True), step_context(first_microbatch=None):
        assert current_step() == StepContext(None, optim_step=True)


@pytest.mark.parametrize("fields", [{"first_microbatch": None}, {"optim_step": False}])
def test_a_step_and_a_field_at_once_is_an_error(fields):
    with pytest.raises(ConfigError, match="both a step and single fields"):
        step_context(FIRST, **fields)


@pytest.mark.parametrize("value", [1, 0, "True", np.bool_(True), FIRST], ids=repr)
def test_a_wrong_first_microbatch_is_an_error_before_entering(value):
    with pytest.raises(ConfigError, match="first_microbatch="):
        step_context(first_microbatch=value)


@pytest.mark.parametrize("value", [None, 1, 0, "True", np.bool_(True)], ids=repr)
def test_a_wrong_optim_step_is_an_error_before_entering(value):
    with pytest.raises(ConfigError, match="optim_step="):
        step_context(optim_step=value)


@pytest.mark.parametrize("value", [True, False, 1, "first", (True, False)], ids=repr)
def test_what_is_no_step_is_an_error(value):
    with pytest.raises(ConfigError, match="must be a StepContext"):
        step_context(value)


def test_an_unknown_name_is_a_type_error():
    with pytest.raises(TypeError, match="first_micro_batch"):
        step_context(first_micro_batch=True)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit, StopIteration])
def test_a_scope_is_restored_after_an_exception(error):
    with step_context(LAST):
        with pytest.raises(error), step_context(FIRST):
            raise error
        assert current_step() == LAST


def test_leaving_out_of_order_raises_and_what_stood_before_both_stands():
    with step_context(LAST):
        outer, inner = entered(first_microbatch=True), entered(first_microbatch=None)
        with pytest.raises(ScopeError, match="out of order"):
            leave(outer)
        assert current_step() == LAST
        leave(inner)
        assert current_step() == LAST
    assert current_step() == OFF


def test_leaving_out_of_order_ends_all_scopes_in_between():
    scopes = [entered(first_microbatch=bool(index % 2)) for index in range(4)]
    with pytest.raises(ScopeError, match="before 2 entered inside it"):
        leave(scopes[1])
    assert current_step() == LATER
    leave(scopes[3])
    leave(scopes[2])
    assert current_step() == LATER
    leave(scopes[0])
    assert current_step() == OFF


def test_an_inner_scope_that_was_ended_cannot_be_left_twice():
    outer, inner = entered(first_microbatch=True), entered(first_microbatch=False)
    with pytest.raises(ScopeError):
        leave(outer)
    leave(inner)
    with pytest.raises(ScopeError, match="not entered"):
        leave(inner)


def test_a_scope_cannot_be_left_twice_or_without_entering():
    scope = entered(first_microbatch=True)
    leave(scope)
    with step_context(LAST):
        for wrong in (scope, step_context(FIRST)):
            with pytest.raises(ScopeError, match="not entered"):
                leave(wrong)
        assert current_step() == LAST


def test_a_scope_cannot_be_entered_twice():
    with step_context(first_microbatch=True) as step:
        scope = entered(optim_step=True)
        with pytest.raises(ScopeError, match="entered already"):
            scope.__enter__()
        leave(scope)
        assert current_step() == step


def test_a_scope_may_be_used_again_and_inherits_anew():
    scope = step_context(optim_step=True)
    with scope:
        assert current_step() == StepContext(None, optim_step=True)
    with step_context(FIRST), scope:
        assert current_step() == StepContext(True, optim_step=True)
    assert current_step() == OFF


@pytest.mark.parametrize("how", ["close", "collect"])
def test_a_generator_closed_in_an_inner_scope_is_silent_and_the_inner_one_stands(how):
    with step_context(LAST):
        generator = suspended(first_microbatch=True)
        inner = entered(first_microbatch=None)
        if how == "close":
            generator.close()
        del generator
        assert current_step() == StepContext(None, optim_step=True)
        leave(inner)
        assert current_step() == LAST


def test_a_generator_that_finishes_in_an_inner_scope_is_out_of_order():
    generator = suspended(first_microbatch=True)
    inner = entered(first_microbatch=False)
    with pytest.raises(ScopeError, match="out of order"):
        next(generator)
    assert current_step() == OFF
    leave(inner)
