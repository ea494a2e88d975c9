from contextlib import contextmanager

import pytest
import torch

from automodel_fn import apply, bf16, cast_plan, fp32, temporary_cast
from automodel_fn.testing import check_temporary_cast


@contextmanager
def does_nothing(model, dtype, then=None):
    yield model


@contextmanager
def keeps_the_pins(model, dtype, then=None):
    report = apply(cast_plan(model, dtype, buffers="all"), model, keep_originals=True)
    yield model
    report.undo()


@contextmanager
def swallows(model, dtype, then=None):
    with temporary_cast(model, dtype, then):
        try:
            yield model
        except Exception:  # noqa: BLE001 - it is to be wrong
            return


@contextmanager
def forgets_errors(model, dtype, then=None):
    inside = temporary_cast(model, dtype, then)
    model.held = inside  # else it ends when it is collected
    inside.__enter__()
    yield model
    inside.__exit__(None, None, None)


@contextmanager
def rounds_what_was_not_edited(model, dtype, then=None):
    with temporary_cast(model, dtype, then):
        yield model
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.to(dtype))


@contextmanager
def drops_edits(model, dtype, then=None):
    before = [parameter.data.clone() for parameter in model.parameters()]
    with temporary_cast(model, dtype, then):
        yield model
    for parameter, data in zip(model.parameters(), before, strict=True):
        parameter.data.copy_(data)


@contextmanager
def gives_a_copy(model, dtype, then=None):
    with temporary_cast(model, dtype, then):
        yield torch.nn.Module()


@pytest.mark.parametrize(
    "wrong",
    [
        does_nothing,
        keeps_the_pins,
        swallows,
        forgets_errors,
        rounds_what_was_not_edited,
        drops_edits,
        gives_a_copy,
    ],
)
def test_a_temporary_cast_that_is_wrong_is_told(model, stand_in, wrong):
    check_temporary_cast(model, bf16)
    stand_in("temporary", "temporary_cast", wrong)
    with pytest.raises(AssertionError, match="temporary"):
        check_temporary_cast(model, bf16)


def test_a_temporary_cast_that_forgets_what_comes_then_is_told(model, stand_in):
    check_temporary_cast(model, fp32, bf16)
    stand_in("temporary", "temporary_cast", lambda model, dtype, then: temporary_cast(model, dtype))
    with pytest.raises(AssertionError, match=r"is torch\.float32, expected torch\.bfloat16"):
        check_temporary_cast(model, fp32, bf16)
