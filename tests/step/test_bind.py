import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from automodel_fn import StepContext, bind, checkpoint_context_fn, current_step, step_context

OFF = StepContext()
FIRST = StepContext(True)
LATER = StepContext(False)

both_modes = pytest.mark.parametrize("use_reentrant", [True, False])


def bound_here(step, function=current_step):
    with step_context(step):
        return bind(function)


def test_a_bound_function_sees_its_step_after_the_scope_and_in_another():
    bound = bound_here(FIRST)
    assert bound() == FIRST
    with step_context(LATER):
        assert bound() == FIRST
        assert current_step() == LATER


def test_a_function_bound_outside_of_scopes_is_off():
    with step_context(FIRST):
        assert bound_here(OFF)() == OFF


def test_a_bound_function_keeps_name_arguments_and_result():
    def pair(first, *, second):
        return first, second

    bound = bind(pair)
    assert bound.__name__ == "pair"
    assert bound(1, second=2) == (1, 2)


def test_an_error_in_a_bound_function_leaves_the_scope():
    def fail():
        raise OSError(str(current_step().first_microbatch))

    with step_context(LATER):
        with pytest.raises(OSError, match="True"):
            bound_here(FIRST, fail)()
        assert current_step() == LATER


def test_bound_functions_nest_and_recur():
    def recur(depth):
        return [current_step(), *(bound_later(depth - 1) if depth else [])]

    bound_later = bound_here(LATER, recur)
    assert bound_here(FIRST, recur)(2) == [FIRST, LATER, LATER]


def test_the_innermost_bind_wins():
    with step_context(LATER):
        assert bind(bound_here(FIRST))() == FIRST


def test_modules_and_partials_can_be_bound(block, leaf):
    bound_here(FIRST, partial(block, leaf))()
    linear = torch.nn.Linear(2, 2)
    linear.register_forward_hook(lambda *_: block.seen.append(current_step()))
    assert bound_here(LATER, linear)(leaf).shape == (2,)
    assert block.seen == [FIRST, LATER]


def test_a_bound_function_takes_its_step_to_threads_and_executors(in_thread):
    bound = bound_here(FIRST)
    assert in_thread(bound) == FIRST
    with ThreadPoolExecutor(4) as pool:
        assert [pool.submit(bound).result() for _ in range(8)] == [FIRST] * 8
        assert pool.submit(current_step).result() == OFF


def test_a_bound_function_in_a_task_changes_no_other_task():
    async def work(bound):
        seen = [bound()]
        await asyncio.sleep(0)
        return [*seen, current_step(), bound()]

    async def together():
        return await asyncio.gather(work(bound_here(FIRST)), work(bound_here(LATER)))

    assert asyncio.run(together()) == [[FIRST, OFF, FIRST], [LATER, OFF, LATER]]


@both_modes
def test_a_bound_block_is_recomputed_with_its_step(block, leaf, use_reentrant):
    outs = [
        checkpoint(bound_here(step, block), leaf, use_reentrant=use_reentrant)
        for step in (FIRST, LATER)
    ]
    with step_context(LATER):
        for out in outs:
            out.sum().backward()
    assert block.seen == [FIRST, LATER, FIRST, LATER]


# The outer of two reentrant checkpoints runs without gradients, and torch warns of the inner one.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@both_modes
def test_nested_checkpoints_are_right_with_bind(block, leaf, use_reentrant):
    def outer(x):
        return checkpoint(bind(block), x.cos(), use_reentrant=use_reentrant)

    with step_context(FIRST):
        out = checkpoint(outer, leaf, use_reentrant=use_reentrant)
    with step_context(LATER):
        out.sum().backward()
    assert len(block.seen) >= 2
    assert set(block.seen) == {FIRST}


def test_checkpoint_context_fn_is_right_where_it_cannot_be_found(block, leaf, in_thread):
    run = partial(checkpoint, use_reentrant=False, context_fn=checkpoint_context_fn)
    with step_context(FIRST):
        out = run(block, leaf)
    with step_context(LATER):
        in_thread(out.sum().backward)
    assert block.seen == [FIRST, FIRST]


def test_checkpoint_context_fn_recomputes_a_retained_graph_twice(block, leaf):
    run = partial(checkpoint, use_reentrant=False, context_fn=checkpoint_context_fn)
    outs = []
    for step in (FIRST, LATER):
        with step_context(step):
            outs.append(run(block, leaf))
    for out in outs:
        out.sum().backward(retain_graph=True)
        out.sum().backward()
    assert block.seen == [FIRST, LATER, FIRST, FIRST, LATER, LATER]
    assert current_step() == OFF


def test_the_forward_context_of_checkpoint_context_fn_changes_nothing():
    with step_context(FIRST):
        forward, recompute = checkpoint_context_fn()
    with step_context(LATER), forward:
        assert current_step() == LATER
        with recompute, recompute:
            assert current_step() == FIRST
        assert current_step() == LATER
