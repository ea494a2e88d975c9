"""Into which steps casts are divided."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from automodel_fn import bf16, fp16, fp32
from automodel_fn.cast._convert import LARGE
from automodel_fn.cast._steps import ends_of_steps


# What `ends_of_steps` asks of a tensor, for a device that is not here.
def on_gpu(dtype):
    return SimpleNamespace(is_cuda=True, dtype=dtype)


@pytest.mark.parametrize("to_dtype", [bf16, fp16, fp32])
@given(sizes=st.lists(st.integers(LARGE, 20 * LARGE), min_size=1, max_size=60))
def test_steps_on_a_gpu_take_the_largest_tensor_a_hundredth_and_what_is_free(to_dtype, sizes):
    ends = ends_of_steps(sizes, 1, on_gpu(fp32), to_dtype)

    assert ends[-1] == len(sizes)
    before_per_byte = {bf16: 2, fp16: 2, fp32: 1}[to_dtype]
    room = max(sizes) + sum(sizes) * before_per_byte / 100
    for start, stop in pairwise((0, *ends)):
        assert start < stop
        step = sizes[start:stop]
        assert len(step) == 1 or sum(step) <= room
        room += (before_per_byte - 1) * sum(step)


def test_few_equal_large_tensors_on_a_gpu_are_cast_in_steps_that_double():
    ends = ends_of_steps([4 * LARGE] * 40, LARGE, on_gpu(fp32), bf16)

    assert [stop - start for start, stop in pairwise((0, *ends))] == [1, 2, 4, 8, 16, 9]


def test_the_first_step_on_a_gpu_takes_a_hundredth_of_the_model():
    ends = ends_of_steps([4 * LARGE] * 400, LARGE, on_gpu(fp32), bf16)

    assert [stop - start for start, stop in pairwise((0, *ends))][:3] == [9, 16, 16]


def test_large_tensors_on_a_cpu_are_cast_one_by_one():
    ends = ends_of_steps([LARGE, 2 * LARGE, LARGE], LARGE, torch.empty(0), bf16)

    assert ends == (1, 2, 3)
