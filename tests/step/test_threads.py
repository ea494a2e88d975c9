import asyncio
import contextvars
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from automodel_fn import ScopeError, StepContext, bind, current_step, step_context
from automodel_fn.step import _ambient, _autograd

OFF = StepContext()
FIRST = StepContext(True)
LATER = StepContext(False)
LAST = StepContext(False, optim_step=True)

both_modes = pytest.mark.parametrize("use_reentrant", [True, False])


def test_a_thread_started_in_a_scope_is_off(in_thread):
    with step_context(FIRST):
        assert in_thread(current_step) == OFF
        assert current_step() == FIRST


def test_threads_have_a_step_each():
    barrier = threading.Barrier(3)
    seen = {}

    def work(step):
        with step_context(step):
            barrier.wait()
            seen[step] = current_step()
            barrier.wait()
        seen[step, "after"] = current_step()

    threads = [threading.Thread(target=work, args=(step,)) for step in (FIRST, LATER, LAST)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for step in (FIRST, LATER, LAST):
        assert (seen[step], seen[step, "after"]) == (step, OFF)


def test_leaving_in_another_thread_raises_and_ends_the_scope(in_thread):
    scope = step_context(first_microbatch=True)
    scope.__enter__()
    with pytest.raises(ScopeError, match="another thread"):
        in_thread(scope.__exit__, None, None, None)
    assert current_step() == OFF


def test_asyncio_tasks_have_a_step_each_between_their_awaits():
    async def work(step):
        seen = []
        with step_context(step):
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(current_step())
                with step_context(optim_step=True):
                    await asyncio.sleep(0)
                    seen.append(current_step())
        await asyncio.sleep(0)
        return [*seen, current_step()]

    async def together():
        return await asyncio.gather(*(work(step) for step in (FIRST, LATER, OFF)))

    for step, seen in zip((FIRST, LATER, OFF), asyncio.run(together()), strict=True):
        optim = StepContext(step.first_microbatch, optim_step=True)
        assert seen == [step, optim] * 3 + [OFF]
    assert current_step() == OFF


def test_a_task_started_in_a_scope_sees_it_until_it_is_left():
    async def started_inside():
        with step_context(LATER):
            task = asyncio.create_task(seen_twice())
            await asyncio.sleep(0)
        return await task

    async def seen_twice():
        first = current_step()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return first, current_step()

    with step_context(FIRST):
        assert asyncio.run(started_inside()) == (LATER, FIRST)


@both_modes
def test_a_backward_from_a_thread_without_scopes_is_off(block, leaf, in_thread, use_reentrant):
    with step_context(FIRST):
        out = checkpoint(block, leaf, use_reentrant=use_reentrant)
        in_thread(out.sum().backward)
    assert block.seen == [FIRST, OFF]


@both_modes
def test_a_backward_from_a_thread_is_right_with_bind(block, leaf, in_thread, use_reentrant):
    with step_context(FIRST):
        out = checkpoint(bind(block), leaf, use_reentrant=use_reentrant)
    in_thread(out.sum().backward)
    assert block.seen == [FIRST, FIRST]


@both_modes
def test_a_context_of_an_ended_thread_is_of_no_other_thread_that_gets_its_number(
    block, leaf, in_thread, monkeypatch, use_reentrant
):
    def enter():
        step_context(FIRST).__enter__()
        return contextvars.copy_context(), threading.get_ident()

    context, number = in_thread(enter)
    monkeypatch.setattr(_ambient, "get_ident", lambda: number)
    with step_context(LATER):
        out = context.run(checkpoint, block, leaf, use_reentrant=use_reentrant)
        out.sum().backward()
    assert block.seen[0] == FIRST
    assert block.seen[1] in (FIRST, OFF)


def test_nodes_made_beside_the_scope_of_a_task_are_not_of_that_scope():
    seen = []

    async def scope(entered, may_leave):
        with step_context(FIRST):
            entered.set()
            await may_leave.wait()

    # Its forward reads no step and enters no scope: nothing tells that it has taken a turn.
    async def beside():
        entered, may_leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(scope(entered, may_leave))
        await entered.wait()
        out = torch.ones(1, requires_grad=True).sin()
        out.register_hook(lambda grad: seen.append(current_step()))
        out.backward()
        may_leave.set()
        await task

    asyncio.run(beside())
    assert seen == [OFF]


async def forward_and_backward(seen, may_run, ran, pause):
    with step_context(LATER):
        await may_run.wait()
        out = torch.ones(1, requires_grad=True).sin()
        out.register_hook(lambda grad: seen.append(current_step()))
        ran.set()
        await pause()
        out.backward()


async def scopes_around(may_run, ran):
    with step_context(FIRST):
        may_run.set()
        await ran.wait()
        with step_context(optim_step=True):
            pass


# The forward reads no step, so that nothing tells that its task has taken the turn of the other.
@pytest.mark.parametrize("num_turns", [0, 10])
def test_a_hook_of_interleaved_tasks_is_off_or_right(num_turns):
    seen = []

    async def pause():
        for _ in range(num_turns):
            await asyncio.sleep(0)

    async def together():
        events = asyncio.Event(), asyncio.Event()
        await asyncio.gather(forward_and_backward(seen, *events, pause), scopes_around(*events))

    asyncio.run(together())
    assert len(seen) == 1
    assert seen[0] in (LATER, OFF)


def test_a_scope_that_is_used_again_is_not_that_of_a_task_which_began_in_its_first_use():
    scope = step_context(FIRST)

    async def look(go):
        await go.wait()
        return current_step()

    async def used_twice():
        go = asyncio.Event()
        with scope:
            task = asyncio.create_task(look(go))
        with step_context(LATER), scope:
            go.set()
            return await task

    assert asyncio.run(used_twice()) == OFF


@both_modes
def test_a_backward_from_a_thread_with_scopes_of_its_own_reads_its_timeline(
    block, leaf, in_thread, use_reentrant
):
    """What is documented as wrong: numbers of nodes are counted by thread, and cannot be told."""
    with step_context(FIRST):
        out = checkpoint(block, leaf, use_reentrant=use_reentrant).sum()

    def work():
        with step_context(LAST):
            out.backward()

    in_thread(work)
    assert block.seen == [FIRST, LAST]


@both_modes
def test_bind_is_right_in_a_thread_with_scopes_of_its_own(block, leaf, in_thread, use_reentrant):
    with step_context(FIRST):
        out = checkpoint(bind(block), leaf, use_reentrant=use_reentrant).sum()

    def work():
        with step_context(LAST):
            out.backward()

    in_thread(work)
    assert block.seen == [FIRST, FIRST]


def enter_a_scope_in_a_thread():
    def enter():
        with step_context(first_microbatch=True):
            pass

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()


def test_the_end_of_a_program_waits_until_autograd_has_let_go_of_ended_threads():
    for _ in range(20):
        enter_a_scope_in_a_thread()
        _autograd._wait_for_ended_threads()

        assert not any(handed.is_to_be_dropped() for handed in _autograd._HANDED)


def test_the_end_of_a_program_waits_no_longer_than_it_must(monkeypatch):
    monkeypatch.setattr(_autograd, "_PATIENCE", 0.01)
    monkeypatch.setattr(_autograd._Handed, "is_to_be_dropped", lambda handed: True)
    with step_context(first_microbatch=True):
        pass

    _autograd._wait_for_ended_threads()


def test_a_program_asks_for_ended_threads_at_its_end():
    program = (
        "from automodel_fn import step_context\n"
        "from automodel_fn.step import _autograd\n"
        "_autograd._Handed.is_to_be_dropped = lambda handed: print('asked')\n"
        "with step_context(first_microbatch=True):\n"
        "    pass\n"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)

    assert done.stdout.split() == [b"asked"]
