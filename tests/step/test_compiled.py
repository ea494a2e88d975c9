import asyncio
import contextlib
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from automodel_fn import ScopeError, StepContext, bind, current_step, step_context

FIRST, LATER, OFF = StepContext(True), StepContext(False), StepContext()
CODES = {FIRST: 2.0, LATER: 3.0, OFF: 5.0}

both_modes = pytest.mark.parametrize("use_reentrant", [True, False])


def factor():
    first = current_step().first_microbatch
    if first is None:
        return 5.0
    return 2.0 if first else 3.0


class CountingBackend:
    def __init__(self):
        self.compilations = 0

    def __call__(self, graph, example_inputs):
        self.compilations += 1
        return graph.forward


@pytest.fixture
def backend():
    torch._dynamo.reset()
    yield CountingBackend()
    torch._dynamo.reset()


@pytest.fixture
def code(backend):
    compiled = torch.compile(lambda x: x * factor(), fullgraph=True, backend=backend)
    return lambda: compiled(torch.ones(())).item()


@pytest.mark.parametrize("step", [FIRST, LATER, OFF])
def test_compiled_code_reads_the_step_without_a_graph_break(code, step):
    with step_context(step):
        assert code() == CODES[step]
    assert code() == CODES[OFF]


def test_compiled_code_is_never_stale_and_compiles_once_for_each_value(code, backend):
    orders = [(FIRST, LATER, OFF), (OFF, FIRST, LATER), (LATER, LATER, FIRST), (OFF, OFF, LATER)]
    for order in orders:
        for step in order:
            with step_context(step):
                assert code() == CODES[step]
        assert code() == CODES[OFF]
    assert backend.compilations == 3


def test_a_field_that_is_not_read_compiles_nothing_anew(code, backend):
    for optim_step in (False, True, False):
        with step_context(first_microbatch=True, optim_step=optim_step):
            assert code() == CODES[FIRST]
    assert backend.compilations == 1


def test_compiled_code_sees_nested_scopes_and_what_stands_after_an_exception(code):
    with step_context(FIRST):
        with contextlib.suppress(KeyError), step_context(LATER):
            assert code() == CODES[LATER]
            raise KeyError
        assert code() == CODES[FIRST]


def test_compiled_code_sees_what_stands_after_leaving_out_of_order(code):
    with step_context(LATER):
        outer, inner = step_context(FIRST), step_context(OFF)
        outer.__enter__()
        inner.__enter__()
        with pytest.raises(ScopeError):
            outer.__exit__(None, None, None)
        assert code() == CODES[LATER]
        inner.__exit__(None, None, None)
        assert code() == CODES[LATER]


def test_compiled_code_in_a_thread_started_in_a_scope_is_off(code, in_thread):
    with step_context(FIRST):
        assert code() == CODES[FIRST]
        assert in_thread(code) == CODES[OFF]


def test_compiled_code_of_two_threads_reads_the_step_of_each(code, backend):
    turns = threading.Barrier(2, timeout=30)
    seen = []

    def work(steps):
        for step in steps:
            turns.wait()
            with step_context(step):
                turns.wait()
                seen.append((step, code()))

    with ThreadPoolExecutor(2) as pool:
        works = [pool.submit(work, steps) for steps in ([FIRST, LATER, OFF], [LATER, OFF, FIRST])]
        for future in works:
            future.result()
    assert len(seen) == 6
    assert all(CODES[step] == got for step, got in seen)
    assert backend.compilations <= 6


def test_many_threads_compile_no_more_graphs_than_there_are_values(code, backend, in_thread):
    def work(step):
        with step_context(step):
            return code()

    steps = [FIRST, LATER, OFF] * 8
    assert [in_thread(work, step) for step in steps] == [CODES[step] for step in steps]
    assert backend.compilations == 3


def test_a_scope_entered_in_a_task_is_off_for_compiled_code(code):
    async def work(step):
        with step_context(step):
            seen = [code()]
            await asyncio.sleep(0)
            assert current_step() == step
            return [*seen, code()]

    async def together():
        return await asyncio.gather(work(FIRST), work(LATER))

    with step_context(FIRST):
        assert asyncio.run(together()) == [[CODES[OFF]] * 2] * 2
        assert code() == CODES[FIRST]


def test_a_scope_around_an_event_loop_is_seen_by_compiled_code_in_its_tasks(code):
    async def work():
        await asyncio.sleep(0)
        return code()

    with step_context(FIRST):
        assert asyncio.run(work()) == CODES[FIRST]


def test_a_context_taken_to_a_worker_leaves_nothing_for_its_compiled_code(code):
    with ThreadPoolExecutor(1) as pool:
        with step_context(FIRST):
            context = contextvars.copy_context()
            assert pool.submit(context.run, current_step).result() == FIRST
        assert pool.submit(code).result() == CODES[OFF]


def test_a_scope_that_another_thread_ended_is_off_for_compiled_code(code, in_thread):
    def generate():
        with step_context(FIRST):
            yield

    generator = generate()
    next(generator)
    assert code() == CODES[FIRST]
    in_thread(generator.close)
    assert code() == CODES[OFF]


def test_a_bound_function_around_compiled_code_takes_its_step_along(code, in_thread):
    with step_context(FIRST):
        bound = bind(code)
    with step_context(LATER):
        assert bound() == CODES[FIRST]
        assert code() == CODES[LATER]
    assert in_thread(bound) == CODES[FIRST]


def test_bind_inside_compiled_code_is_the_step_of_the_thread(backend):
    compiled = torch.compile(lambda x: x * bind(factor)(), fullgraph=True, backend=backend)
    for step in (FIRST, LATER, FIRST):
        with step_context(step):
            assert compiled(torch.ones(())).item() == CODES[step]


def sine(x):
    return (x * factor()).sin()


def gradient(step, x):
    return CODES[step] * (CODES[step] * x.detach()).cos()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_checkpoint_inside_compiled_code_keeps_the_forwards_step(backend, compiler):
    @torch.compile(fullgraph=True, backend=compiler)
    def compiled(x):
        return checkpoint(sine, x, use_reentrant=False)

    outs, leaves = [], []
    for step in (FIRST, LATER):
        leaves.append(torch.ones(2, requires_grad=True))
        with step_context(step):
            outs.append(compiled(leaves[-1]))
    for step, leaf, out in zip((FIRST, LATER), leaves, outs, strict=True):
        out.sum().backward()
        torch.testing.assert_close(leaf.grad, gradient(step, leaf))


@both_modes
def test_a_checkpoint_around_compiled_code_keeps_the_forwards_step_with_bind(
    backend, use_reentrant
):
    compiled = torch.compile(sine, fullgraph=True, backend=backend)
    outs, leaves = [], []
    for step in (FIRST, LATER):
        leaves.append(torch.ones(2, requires_grad=True))
        with step_context(step):
            outs.append(checkpoint(bind(compiled), leaves[-1], use_reentrant=use_reentrant))
    with step_context(OFF):
        for step, leaf, out in zip((FIRST, LATER), leaves, outs, strict=True):
            out.sum().backward()
            torch.testing.assert_close(leaf.grad, gradient(step, leaf))


def test_a_checkpoint_around_compiled_code_reads_the_step_of_its_thread_without_bind(backend):
    """What is documented: compiled code knows its thread's step only."""
    seen = torch.compile(lambda x: x * 0 + factor(), fullgraph=True, backend=backend)
    read = []

    def block(x):
        read.append(seen(x.detach()).item())
        return x.sin()

    x = torch.ones((), requires_grad=True)
    with step_context(FIRST):
        out = checkpoint(block, x, use_reentrant=False)
    with step_context(LATER):
        out.backward()
    assert read == [CODES[FIRST], CODES[LATER]]
