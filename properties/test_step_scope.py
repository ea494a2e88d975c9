from hypothesis import given
from hypothesis import strategies as st

from automodel_fn import accumulate, current_step, step_context
from automodel_fn.testing import StepScopeMachine, step_contexts

TestStepScope = StepScopeMachine.TestCase


@given(st.lists(step_contexts(), max_size=6))
def test_nested_scopes_unwind_to_what_stood_before(steps):
    def nest(depth):
        before = current_step()
        if depth < len(steps):
            with step_context(steps[depth]) as given_step:
                assert given_step == current_step() == steps[depth]
                nest(depth + 1)
        assert current_step() == before

    nest(0)


@given(st.integers(0, 20), st.integers(1, 6))
def test_accumulate_marks_the_first_and_the_last_of_every_step(num_batches, num_microbatches):
    pairs = list(accumulate(range(num_batches), num_microbatches))
    assert [batch for _, batch in pairs] == list(range(num_batches))
    for place, (step, _) in enumerate(pairs):
        assert step.first_microbatch is (place % num_microbatches == 0)
        is_last_of_step = (place + 1) % num_microbatches == 0
        assert step.optim_step is (is_last_of_step or place + 1 == num_batches)
