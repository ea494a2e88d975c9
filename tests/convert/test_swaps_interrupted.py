import signal

import attrs
import pytest
from convert_families import OWN, small_model

from automodel_fn import apply, backend_plan
from automodel_fn.convert import _changes

OTHER = attrs.evolve(OWN, rms_norm="torch_fp32", attn="eager")
CLASSES = (_changes.ClassChange, _changes.ConfigChange)


@pytest.fixture
def llama():
    return small_model("llama")


@pytest.fixture
def at_each_change(monkeypatch):
    """Calls something after each change with the number of those that there were."""

    def install(call):
        done = []

        def counted(own):
            def exchange(self):
                own(self)
                done.append(self)
                call(len(done))

            return exchange

        for cls in CLASSES:
            monkeypatch.setattr(cls, "exchange", counted(cls.exchange))
        return done

    return install


def test_as_many_changes_are_made_as_there_are_modules_and_configs(llama, at_each_change):
    done = at_each_change(lambda number: None)
    apply(backend_plan(llama, OTHER))

    assert len(done) == 6


@pytest.mark.parametrize("position", range(1, 7))
def test_ctrl_c_after_any_change_leaves_the_model_as_it_was(llama, state, at_each_change, position):
    plan, before = backend_plan(llama, OTHER), state(llama)
    at_each_change(lambda number: number == position and signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        apply(plan)

    assert state(llama) == before


@pytest.mark.parametrize("position", range(1, 7))
def test_ctrl_c_in_an_undo_leaves_the_model_as_it_was_swapped(
    llama, state, at_each_change, position
):
    report = apply(backend_plan(llama, OTHER))
    swapped = state(llama)
    at_each_change(lambda number: number == position and signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        report.undo()

    assert state(llama) == swapped
