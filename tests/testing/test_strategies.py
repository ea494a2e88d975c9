import random

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from torch import nn

from automodel_fn import bf16, cast_plan
from automodel_fn.testing import dtypes, models, pin_patterns, step_contexts, tensors

FIND = settings(
    max_examples=3000,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
SOME = settings(max_examples=50, deadline=None, derandomize=True, database=None)


def found(strategy, condition):
    return find(strategy, condition, settings=FIND, random=random.Random(0))


def gradient(model):
    return any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("bits", [-0x80000000, 1, 0x7F800000, 0x7F800123, 0x3F808000, 0x3F818000])
def test_tensors_have_the_corners_of_float32(bits):
    def has(tensor):
        return bits in tensor.contiguous().view(torch.int32).flatten().tolist()

    found(tensors(torch.float32), has)


@SOME
@given(dtypes().flatmap(lambda dtype: st.tuples(st.just(dtype), tensors(dtype))))
def test_tensors_have_the_dtype_that_was_asked_for(pair):
    dtype, tensor = pair
    assert tensor.dtype == dtype


@SOME
@given(models(), st.data())
def test_patterns_match_something(model, data):
    cast_plan(model, bf16, keep_fp32=data.draw(pin_patterns(model)))


def test_a_model_without_tensors_has_no_patterns():
    assert find(pin_patterns(nn.Identity()), lambda value: True) == ()


def test_all_six_steps_are_made():
    seen = set()

    @SOME
    @given(step_contexts())
    def collect(step):
        seen.add(step)

    collect()
    assert len(seen) == 6


def test_only_castable_dtypes_are_made_where_asked_for():
    with pytest.raises(NoSuchExample):
        found(dtypes(castable=True), lambda dtype: dtype.itemsize > 4)


def test_a_made_model_tells_in_its_repr_what_it_is():
    model = found(models(), gradient)
    assert "requires_grad grad" in repr(model)
