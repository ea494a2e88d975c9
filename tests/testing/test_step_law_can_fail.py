import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from automodel_fn import ScopeError, StepContext, step_context
from automodel_fn.testing import StepScopeMachine

# Enough for every rule to be tried, the same examples every time, and nothing is shrunk.
QUICK = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=["generate"],
    suppress_health_check=["too_slow"],
)


class Silent(step_context):
    __slots__ = ()

    def __exit__(self, *exc):
        try:
            return super().__exit__(*exc)
        except ScopeError:
            return None


class Swallowing(step_context):
    __slots__ = ()

    def __exit__(self, *exc):
        super().__exit__(*exc)
        return exc[0] is ValueError


class Loud(step_context):
    __slots__ = ()

    def __exit__(self, kind, exc, traceback):
        super().__exit__(None if kind is GeneratorExit else kind, exc, traceback)


class NeverInheriting(step_context):
    __slots__ = ()

    def __init__(self, step=None, **fields):
        super().__init__(StepContext(**fields) if step is None else step)


def run():
    run_state_machine_as_test(StepScopeMachine, settings=QUICK)


def test_the_machine_passes_on_what_is_right():
    run()


@pytest.mark.parametrize("wrong", [Silent, Swallowing, Loud, NeverInheriting])
def test_scopes_that_are_no_stack_are_told(stand_in, wrong):
    stand_in("step", "step_context", wrong)
    with pytest.raises((AssertionError, ScopeError)):
        run()


def test_a_step_that_is_never_in_force_is_told(stand_in):
    stand_in("step", "current_step", StepContext)
    with pytest.raises(AssertionError, match="in force"):
        run()


def test_a_bound_function_that_sees_the_caller_is_told(stand_in):
    stand_in("step", "bind", lambda function: function)
    with pytest.raises(AssertionError, match="bound"):
        run()
