"""Law of step scopes: they behave as a plain list does."""

from __future__ import annotations

import threading
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from automodel_fn.errors import ScopeError
from automodel_fn.step._ambient import current_step, step_context
from automodel_fn.step._bind import bind
from automodel_fn.step._context import StepContext
from automodel_fn.testing._facts import demand
from automodel_fn.testing._strategies_arguments import step_contexts

_OFF = StepContext()
_FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "first_microbatch": st.sampled_from((None, True, False)),
        "optim_step": st.booleans(),
    },
)


class StepScopeMachine(RuleBasedStateMachine):
    """Law: scopes are a stack; one left out of order raises, and what stood before it stands.

    Hypothesis enters and leaves scopes in every order and compares what is read with a plain list.
    Give its `TestCase` to pytest or unittest.

    Example:
        >>> StepScopeTest = StepScopeMachine.TestCase
        >>> from hypothesis.stateful import run_state_machine_as_test
        >>> run_state_machine_as_test(StepScopeMachine)
    """

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[step_context, StepContext]] = []
        self.ended: list[step_context] = []
        self.left: list[step_context] = []
        self.bound: list[tuple[Any, StepContext]] = []

    @property
    def expected(self) -> StepContext:
        """The step that the list says is in force."""
        return self.open[-1][1] if self.open else _OFF

    @rule(step=step_contexts())
    def enter_a_step(self, step: StepContext) -> None:
        """A step replaces all fields."""
        self._enter(step_context(step), step)

    @rule(fields=_FIELDS)
    def enter_fields(self, fields: dict[str, Any]) -> None:
        """Fields that are not given are those of the enclosing scope."""
        outer = self.expected
        step = StepContext(
            fields.get("first_microbatch", outer.first_microbatch),
            optim_step=fields.get("optim_step", outer.optim_step),
        )
        self._enter(step_context(**fields), step)

    def _enter(self, scope: step_context, step: StepContext) -> None:
        demand(scope.__enter__() == step, "a scope gave another step than it was made for")
        self.open.append((scope, step))

    @precondition(lambda self: self.open)
    @rule(kind=st.sampled_from((None, ValueError, GeneratorExit, KeyboardInterrupt)))
    def leave(self, kind: type[BaseException] | None) -> None:
        """The innermost scope ends silently, with or without an exception, and swallows none."""
        scope, _ = self.open.pop()
        swallowed = scope.__exit__(kind, kind() if kind else None, None)
        demand(not swallowed, f"a scope swallowed {kind}")
        self.left.append(scope)

    @precondition(lambda self: len(self.open) > 1)
    @rule(data=st.data(), kind=st.sampled_from((None, ValueError)))
    def leave_out_of_order(self, data: st.DataObject, kind: type[BaseException] | None) -> None:
        """It raises, and it and all entered inside it are ended."""
        place = data.draw(st.integers(0, len(self.open) - 2))
        scope = self.open[place][0]
        try:
            scope.__exit__(kind, kind() if kind else None, None)
        except ScopeError:
            self.ended += [inner for inner, _ in self.open[place + 1 :]]
            self.left.append(scope)
            del self.open[place:]
        else:
            raise AssertionError("a scope was left out of order and nothing was raised")

    @precondition(lambda self: len(self.open) > 1)
    @rule(data=st.data())
    def close_a_generator(self, data: st.DataObject) -> None:
        """Its scope goes without a word, and those entered inside it stand."""
        scope, _ = self.open.pop(data.draw(st.integers(0, len(self.open) - 2)))
        scope.__exit__(GeneratorExit, GeneratorExit(), None)
        self.left.append(scope)

    @precondition(lambda self: self.ended)
    @rule()
    def leave_an_ended_scope(self) -> None:
        """What a misuse has ended already is left without another error."""
        scope = self.ended.pop()
        scope.__exit__(None, None, None)
        self.left.append(scope)

    @precondition(lambda self: self.left)
    @rule(data=st.data())
    def leave_twice(self, data: st.DataObject) -> None:
        """It raises, and nothing changes."""
        scope = data.draw(st.sampled_from(self.left))
        try:
            scope.__exit__(None, None, None)
        except ScopeError:
            return
        raise AssertionError("a scope was left twice and nothing was raised")

    @rule()
    def bind_here(self) -> None:
        """A bound function sees this step later on."""
        self.bound.append((bind(current_step), self.expected))

    @precondition(lambda self: self.bound)
    @rule(data=st.data())
    def call_bound(self, data: st.DataObject) -> None:
        """It sees the step that it was bound in, and leaves none behind."""
        function, step = data.draw(st.sampled_from(self.bound))
        demand(function() == step, "a bound function saw another step")

    @rule()
    def read_in_a_thread(self) -> None:
        """Another thread sees no scope of this one."""
        seen: list[StepContext] = []
        thread = threading.Thread(target=lambda: seen.append(current_step()))
        thread.start()
        thread.join()
        demand(seen == [_OFF], f"another thread sees {seen}")

    @invariant()
    def reads_as_the_list_says(self) -> None:
        """The step in force is that of the innermost open scope."""
        found = current_step()
        demand(found == self.expected, f"in force is {found}, expected {self.expected}")

    def teardown(self) -> None:
        """Leave what is still open."""
        while self.open:
            self.open.pop()[0].__exit__(None, None, None)
