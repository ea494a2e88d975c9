import gc
import threading
import weakref
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from automodel_fn import bind, checkpoint_context_fn, current_step, step_context

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]
both_modes = pytest.mark.parametrize("use_reentrant", [True, False])


class Block:
    def __init__(self):
        self.seen = []

    def __call__(self, x):
        self.seen.append(current_step().first_microbatch)
        return x.sin()


@pytest.fixture
def leaf():
    return torch.ones(4, device="cuda", requires_grad=True)


@both_modes
@pytest.mark.parametrize("backward_scope", [None, True, False])
def test_a_recompute_sees_the_step_of_its_forward(leaf, use_reentrant, backward_scope):
    block, outs = Block(), []
    for first in (True, False):
        with step_context(first_microbatch=first):
            outs.append(checkpoint(block, leaf, use_reentrant=use_reentrant))
    with step_context(first_microbatch=backward_scope):
        for out in outs:
            out.sum().backward()

    assert block.seen == [True, False, True, False]
    torch.testing.assert_close(leaf.grad, 2 * leaf.detach().cos())


@both_modes
def test_a_recompute_inside_the_scope_sees_it(leaf, use_reentrant):
    block = Block()
    with step_context(first_microbatch=True):
        checkpoint(block, leaf, use_reentrant=use_reentrant).sum().backward()

    assert block.seen == [True, True]


@both_modes
def test_a_recompute_after_the_scope_was_left_sees_it(leaf, use_reentrant):
    block = Block()
    with step_context(first_microbatch=True):
        out = checkpoint(block, leaf, use_reentrant=use_reentrant)
    out.sum().backward()

    assert block.seen == [True, True]
    assert current_step().first_microbatch is None


def test_a_nested_recompute_that_is_not_reentrant_sees_its_forward(leaf):
    block = Block()
    once = partial(checkpoint, use_reentrant=False)
    with step_context(first_microbatch=True):
        out = once(lambda x: once(block, x).cos(), leaf)
    with step_context(first_microbatch=False):
        out.sum().backward()

    assert set(block.seen) == {True}


def test_the_inner_part_of_reentrant_checkpoints_is_off_and_right_with_bind(leaf):
    free, bound = Block(), Block()
    once = partial(checkpoint, use_reentrant=True)
    with step_context(first_microbatch=True):
        outs = [
            once(lambda x: once(free, x).cos(), leaf),
            once(lambda x: once(bind(bound), x).cos(), leaf),
        ]
    with step_context(first_microbatch=False):
        for out in outs:
            out.sum().backward()

    assert free.seen == [True, True, None]
    assert bound.seen == [True, True, True]


def test_checkpoint_context_fn_carries_the_step(leaf):
    block = Block()
    with step_context(first_microbatch=True):
        out = checkpoint(block, leaf, use_reentrant=False, context_fn=checkpoint_context_fn)
    out.sum().backward()

    assert block.seen == [True, True]


@both_modes
def test_a_second_backward_recomputes_with_the_same_step(leaf, use_reentrant):
    block = Block()
    with step_context(first_microbatch=True):
        out = checkpoint(block, leaf, use_reentrant=use_reentrant).sum()
    out.backward(retain_graph=True)
    out.backward()

    assert block.seen == [True, True, True]


@pytest.mark.parametrize("stops_early", [True, False])
def test_a_recompute_sees_its_step_whether_it_stops_early_or_not(leaf, stops_early):
    block = Block()

    def twice(x):
        y = block(x) + 1  # all that the backward needs is made here
        block.seen.append(current_step().first_microbatch)
        return y

    with set_checkpoint_early_stop(stops_early):
        with step_context(first_microbatch=True):
            out = checkpoint(twice, leaf, use_reentrant=False)
        with step_context(first_microbatch=False):
            out.sum().backward()

    assert block.seen == [True] * (3 if stops_early else 4)


@both_modes
@pytest.mark.parametrize("carries", [True, False])
def test_a_backward_from_another_thread_is_off_or_right_with_bind(leaf, use_reentrant, carries):
    block = Block()
    with step_context(first_microbatch=True):
        run = bind(block) if carries else block
        out = checkpoint(run, leaf, use_reentrant=use_reentrant).sum()
    thread = threading.Thread(target=out.backward)
    thread.start()
    thread.join(timeout=60)

    assert block.seen == [True, True if carries else None]


@both_modes
def test_two_engine_threads_that_recompute_at_once_each_see_their_own(leaf, use_reentrant):
    seen, meeting = {True: [], False: []}, threading.Barrier(2, timeout=60)

    def block(x):
        is_recompute = all(seen.values())
        if is_recompute:
            meeting.wait()
        seen[x.is_cuda].append(current_step().first_microbatch)
        if is_recompute:
            meeting.wait()
        return x.sin()

    options = {"use_reentrant": use_reentrant, "preserve_rng_state": False}
    with step_context(first_microbatch=True):
        host = checkpoint(block, torch.ones(4, requires_grad=True), **options).sum()
    with step_context(first_microbatch=False):
        there = checkpoint(block, leaf, **options).sum()
    torch.autograd.backward([host, there])

    assert seen == {False: [True, True], True: [False, False]}


@both_modes
def test_reading_the_step_in_a_recompute_keeps_no_tensor_alive(leaf, use_reentrant):
    alive = []

    def block(x):
        y = x.sin()
        current_step()
        alive.append(weakref.ref(y))
        return y.exp()

    gc.collect()
    gc.disable()
    try:
        with step_context(first_microbatch=True):
            checkpoint(block, leaf, use_reentrant=use_reentrant).sum().backward()
        assert [reference() for reference in alive] == [None, None]
    finally:
        gc.enable()


def test_many_steps_in_a_row_stay_right(leaf):
    block = Block()
    expected = []
    for number in range(300):
        with step_context(first_microbatch=number % 4 == 0):
            checkpoint(block, leaf, use_reentrant=number % 2 == 0).sum().backward()
        expected += [number % 4 == 0] * 2

    assert block.seen == expected
