import attrs
import numpy as np
import pytest

from automodel_fn import (
    AutomodelFnError,
    ConfigError,
    StepContext,
    accumulate,
    current_step,
    step_context,
)

NOT_A_BOOL = [1, 0, 1.0, "True", "", (), np.bool_(True), np.bool_(False), ...]


def drained(batches, num_microbatches):
    return [
        (step.first_microbatch, step.optim_step, batch)
        for step, batch in accumulate(batches, num_microbatches)
    ]


def test_the_default_step_is_off():
    assert StepContext() == StepContext(None, optim_step=False)
    assert StepContext().first_microbatch is None
    assert StepContext().optim_step is False


@pytest.mark.parametrize("field", ["first_microbatch", "optim_step"])
def test_a_step_cannot_be_changed(field):
    step = StepContext(True)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(step, field, False)
    assert step == StepContext(True, optim_step=False)


def test_a_step_takes_no_further_attributes():
    with pytest.raises(AttributeError):
        StepContext().index = 1


def test_evolve_gives_a_changed_copy():
    step = StepContext(True)
    assert attrs.evolve(step, optim_step=True) == StepContext(True, optim_step=True)
    assert step == StepContext(True)


def test_equal_steps_have_equal_hashes_and_different_ones_are_different_keys():
    steps = [StepContext(f, optim_step=o) for f in (None, True, False) for o in (True, False)]
    again = [StepContext(f, optim_step=o) for f in (None, True, False) for o in (True, False)]
    assert len(set(steps)) == 6
    assert [hash(step) for step in steps] == [hash(step) for step in again]
    assert set(steps) == set(again)


def test_off_is_not_the_same_as_not_first():
    assert StepContext(None) != StepContext(False)


def test_optim_step_is_given_by_name_only():
    with pytest.raises(TypeError):
        StepContext(True, True)


@pytest.mark.parametrize("value", NOT_A_BOOL, ids=repr)
def test_first_microbatch_must_be_true_false_or_none(value):
    with pytest.raises(ConfigError, match=r"first_microbatch=.*must be True, False or None"):
        StepContext(value)


@pytest.mark.parametrize("value", [None, *NOT_A_BOOL], ids=repr)
def test_optim_step_must_be_true_or_false(value):
    with pytest.raises(ConfigError, match=r"optim_step=.*must be True or False"):
        StepContext(optim_step=value)


def test_evolve_validates_too():
    with pytest.raises(ConfigError):
        attrs.evolve(StepContext(), first_microbatch=1)


def test_a_wrong_value_is_also_a_value_error():
    with pytest.raises(ValueError, match="first_microbatch='yes'") as caught:
        StepContext("yes")
    assert isinstance(caught.value, AutomodelFnError)


def test_accumulate_marks_the_first_and_the_last_of_each_step():
    assert drained("abcdef", 3) == [
        (True, False, "a"),
        (False, False, "b"),
        (False, True, "c"),
        (True, False, "d"),
        (False, False, "e"),
        (False, True, "f"),
    ]


@pytest.mark.parametrize(("length", "last"), [(4, [3]), (5, [3, 4]), (7, [3, 6]), (8, [3, 7])])
def test_the_last_of_a_partial_step_steps_too(length, last):
    assert [batch for _, optim, batch in drained(range(length), 4) if optim] == last


def test_a_single_batch_of_many_is_first_and_last():
    assert drained("a", 4) == [(True, True, "a")]


def test_one_microbatch_is_always_first_and_last():
    assert drained("abc", 1) == [(True, True, "a"), (True, True, "b"), (True, True, "c")]


def test_no_batches_give_no_steps():
    assert drained([], 3) == []


def test_accumulate_reads_exactly_one_item_ahead():
    read = []

    def source():
        for index in range(4):
            read.append(index)
            yield index

    pairs = accumulate(source(), 2)
    assert read == []
    assert [(batch, len(read)) for _, batch in pairs] == [(0, 2), (1, 3), (2, 4), (3, 4)]


def test_accumulate_takes_a_generator_and_any_batch():
    batches = [None, {}, object(), ()]
    assert [batch for _, batch in accumulate((b for b in batches), 3)] == batches


def test_an_error_of_the_source_reaches_the_caller():
    def source():
        yield "a"
        yield "b"
        raise OSError("disk")

    pairs = accumulate(source(), 2)
    assert next(pairs) == (StepContext(True), "a")
    with pytest.raises(OSError, match="disk"):
        next(pairs)


@pytest.mark.parametrize("value", [0, -1, True, False, 2.0, "2", None], ids=repr)
def test_a_wrong_num_microbatches_is_an_error_at_the_call(value):
    with pytest.raises(ConfigError, match=f"num_microbatches={value!r}"):
        accumulate("ab", value)


def test_batches_that_cannot_be_iterated_are_an_error_at_the_call():
    with pytest.raises(TypeError):
        accumulate(5, 2)


def test_accumulate_enters_no_scope():
    for _ in accumulate("ab", 2):
        assert current_step() == StepContext()
    with step_context(first_microbatch=False, optim_step=True):
        for _ in accumulate("ab", 2):
            assert current_step() == StepContext(False, optim_step=True)


def test_two_accumulates_do_not_share_a_count():
    one, other = accumulate("abc", 2), accumulate("xyz", 3)
    firsts = [(next(one)[0].first_microbatch, next(other)[0].first_microbatch) for _ in range(3)]
    assert firsts == [(True, True), (False, False), (True, False)]
