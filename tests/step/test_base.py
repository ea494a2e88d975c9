import asyncio

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from automodel_fn import ScopeError, StepContext, bind, current_step, step_context
from automodel_fn.step._base import set_base_step

FIRST, LATER = StepContext(True), StepContext(False)
LAST = StepContext(False, optim_step=True)


@pytest.fixture(autouse=True)
def off_afterwards():
    yield
    set_base_step(StepContext())


def test_it_is_in_force_outside_of_scopes_until_it_is_set_again():
    set_base_step(FIRST)
    seen = [current_step()]
    set_base_step(LATER)
    seen.append(current_step())
    set_base_step(StepContext())

    assert [*seen, current_step()] == [FIRST, LATER, StepContext()]


def test_a_scope_inherits_from_it_and_hides_it():
    set_base_step(LATER)

    with step_context(optim_step=True) as inherited:
        assert current_step() == inherited == LAST
    with step_context(FIRST):
        assert current_step() == FIRST
    assert current_step() == LATER


def test_inside_a_scope_it_cannot_be_set_and_nothing_changes():
    set_base_step(LATER)

    with step_context(FIRST):
        with pytest.raises(ScopeError, match="inside the scope of"):
            set_base_step(LAST)
        assert current_step() == FIRST
    assert current_step() == LATER


def test_another_thread_has_its_own(in_thread):
    set_base_step(FIRST)

    def other():
        before = current_step()
        set_base_step(LAST)
        return before, current_step()

    assert in_thread(other) == (StepContext(), LAST)
    assert current_step() == FIRST


def test_a_bound_function_takes_it_along(in_thread):
    set_base_step(FIRST)

    assert in_thread(bind(current_step)) == FIRST


def test_tasks_of_the_thread_see_it():
    set_base_step(FIRST)

    async def read():
        return current_step()

    assert asyncio.run(read()) == FIRST


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recompute_sees_the_one_of_its_forward(use_reentrant):
    seen = []

    def forward(x):
        seen.append(current_step())
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    outputs = []
    for step in (FIRST, LATER):
        set_base_step(step)
        outputs.append(checkpoint(forward, x, use_reentrant=use_reentrant))
    set_base_step(StepContext())
    for output in outputs:
        output.sum().backward()

    assert seen == [FIRST, LATER, FIRST, LATER]


def test_compiled_code_sees_it_and_is_never_stale():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def read(x):
        first = current_step().first_microbatch
        return x + (3 if first is None else 1 if first else 2)

    seen = []
    for step in (StepContext(), FIRST, LATER, FIRST):
        set_base_step(step)
        seen.append(read(torch.zeros(())).item())

    assert seen == [3, 1, 2, 1]
