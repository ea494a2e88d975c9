from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path

import pytest
from torch import nn

from automodel_fn import apply, bf16, cast, cast_plan, restore, snapshot, temporary_cast

BEFORE, AFTER = "before", "after"
FILES = (str(Path(cast.__file__).parent), contextlib.__file__)


# Presses Ctrl-C before the n-th line of Python that casting runs, and counts them all.
class _AtLine:
    def __init__(self, n):
        self.n, self.seen = n, 0

    def __enter__(self):
        self.previous = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.previous)

    def _trace(self, frame, event, arg):
        return self._line if frame.f_code.co_filename.startswith(FILES) else None

    def _line(self, frame, event, arg):
        if event == "line":
            self.seen += 1
            if self.seen == self.n:
                signal.raise_signal(signal.SIGINT)
        return self._line


@pytest.fixture
def make(make_holder, special):
    def make():
        flat = special(12)
        model = make_holder(weight=nn.Parameter(special(4)), table=special(2, 3).t())
        model.left, model.right = nn.Parameter(flat[:8]), nn.Parameter(flat[4:])
        model.pin = nn.Parameter(special(3).to(bf16))
        model.weight.grad = special(4)
        return model

    return make


def planned(model):
    return cast_plan(model, bf16, keep_fp32="pin")


def streaming(model):
    plan = planned(model)
    return lambda: apply(plan, model)


def keeping(model):
    plan = planned(model)
    return lambda: apply(plan, model, keep_originals=True, checksum=True)


def undoing(model):
    return apply(planned(model), keep_originals=True).undo


def restoring(model):
    saved = snapshot(model)
    apply(planned(model))
    return lambda: restore(saved, model)


def entering(model):
    return temporary_cast(model, bf16).__enter__


def leaving(model):
    context = temporary_cast(model, bf16)
    context.__enter__()
    model.weight.data[0] = 3.0
    return lambda: context.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("prepare", "allowed"),
    [
        (streaming, {BEFORE, AFTER}),
        (keeping, {BEFORE}),
        (undoing, {BEFORE, AFTER}),
        (restoring, {BEFORE, AFTER}),
        (entering, {BEFORE}),
        (leaving, {AFTER}),
    ],
)
def test_ctrl_c_at_any_line_leaves_a_whole_model(make, state_of, prepare, allowed):
    done = make()
    effect = prepare(done)
    with _AtLine(0) as counter:
        effect()
    after, num_lines = state_of(done), counter.seen
    assert num_lines > 100

    for n in range(1, num_lines + 1):
        model = make()
        effect = prepare(model)
        before = state_of(model)
        with pytest.raises(KeyboardInterrupt), _AtLine(n):
            effect()
        del effect  # a context manager that nobody holds ends
        now = state_of(model)
        assert now.objects == before.objects
        unlike = {BEFORE: now.differing_values(before), AFTER: now.differing_values(after)}
        assert any(not unlike[state] for state in allowed), f"line {n} of {num_lines}: {unlike}"


def test_an_error_after_the_cast_brings_kept_originals_back(make, state_of, monkeypatch):
    model = make()
    before = state_of(model)

    def fails(_):
        raise MemoryError

    monkeypatch.setattr("automodel_fn.cast._apply.checksum_of", fails)
    with pytest.raises(MemoryError):
        apply(planned(model), model, keep_originals=True, checksum=True)

    assert state_of(model).differences(before) == []


def test_an_error_after_a_streaming_cast_leaves_it_cast(make, state_of, monkeypatch):
    model, done = make(), make()
    apply(planned(done), done)

    def fails(_):
        raise MemoryError

    monkeypatch.setattr("automodel_fn.cast._apply.checksum_of", fails)
    with pytest.raises(MemoryError):
        apply(planned(model), model, checksum=True)

    assert state_of(model).differing_values(state_of(done)) == []
