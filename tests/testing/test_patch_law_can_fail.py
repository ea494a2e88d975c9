import functools

import pytest
import torch

from automodel_fn import StepContext, step_context
from automodel_fn.te import _record
from automodel_fn.te._patch import PatchHandle, patch_classes
from automodel_fn.testing import check_patch_passes_step, check_patch_reversible, te_stand_ins

FIRST, LATER = StepContext(True), StepContext(False)
EVENTS = (
    *(FIRST, "forward", "change", LATER, "forward", None, "leave", "leave"),
    *("change", "forward", FIRST, "checkpoint", LATER, "change", "checkpoint"),
    *("leave", "leave", "change", "backward", True, False),
    *("change", "forward", LATER, "forward", "leave"),
)


@pytest.fixture
def classes():
    return te_stand_ins()


@pytest.fixture
def outputs(classes):
    layer = classes.linear(4, 4)
    return lambda: [layer(torch.ones(1, 4), is_first_microbatch=None)]


def test_the_laws_pass_on_what_is_right(classes, outputs):
    check_patch_reversible(classes, outputs=outputs)
    check_patch_passes_step(EVENTS)


# Patches that cannot be undone, or are none.


class Wrong:
    """A patch of the forwards that does one thing wrong."""

    is_active = True

    def __init__(self, classes, read_step):
        self.classes = [cls for _, cls in classes.items()]
        self.own = [vars(cls).get("forward") for cls in self.classes]
        for cls in self.classes:
            self.wrap(cls, cls.forward)

    def wrap(self, cls, forward):
        @functools.wraps(forward)
        def wrapped(self, *args, **kwargs):
            return forward(self, *args, **kwargs)

        cls.forward = wrapped

    def remove(self):
        for cls, forward in zip(self.classes, self.own, strict=True):
            self.unwrap(cls, forward)

    def unwrap(self, cls, forward):
        if forward is None:
            del cls.forward
        else:
            cls.forward = forward


class WrapsEachTime(Wrong):
    pass


class NeverUnwraps(Wrong):
    def remove(self):
        pass


class LeavesTheNormsTheirOwn(Wrong):
    def unwrap(self, cls, forward):
        cls.forward = forward or cls.forward.__wrapped__


class ReordersTheClass(Wrong):
    def unwrap(self, cls, forward):
        if "forward" in vars(cls):
            del cls.forward
        if forward is not None:
            cls.forward = forward


class MarksTheClass(Wrong):
    def wrap(self, cls, forward):
        super().wrap(cls, forward)
        cls.is_patched = True


class ForgetsAClass(Wrong):
    def wrap(self, cls, forward):
        if cls.__name__ != "LayerNormMLP":
            super().wrap(cls, forward)


class AddsOne(Wrong):
    def wrap(self, cls, forward):
        def wrapped(self, *args, **kwargs):
            return forward(self, *args, **kwargs) + 1

        cls.forward = wrapped


ONE = [None, 0]
WRONG = {
    WrapsEachTime: ([None, None], "wrapped again"),
    NeverUnwraps: (ONE, "without a handle"),
    LeavesTheNormsTheirOwn: (ONE, "without a handle RMSNorm"),
    ReordersTheClass: (ONE, "without a handle"),
    MarksTheClass: (ONE, "changed more of"),
    ForgetsAClass: (ONE, "LayerNormMLP is not wrapped"),
    AddsOne: (ONE, "explicit argument"),
}


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_a_patch_that_cannot_be_undone_is_told(classes, outputs, stand_in, kind):
    actions, message = WRONG[kind]
    stand_in("patch", "patch_classes", kind)
    with pytest.raises(AssertionError, match=message):
        check_patch_reversible(classes, actions, outputs)


def test_a_handle_that_unwraps_for_all_is_told(classes, monkeypatch):
    def remove(self):
        for cls in self._classes:
            entry = _record._record.get(cls)
            for holder in tuple(entry.holders if entry else ()):
                _record.release(cls, holder)

    monkeypatch.setattr(PatchHandle, "remove", remove)
    with pytest.raises(AssertionError, match="not wrapped"):
        check_patch_reversible(classes, [None, None, 0])


# Patches that pass another step.


def passing(change):
    """As the patch, with a reader of the step that is wrong."""

    def patched(classes, read_step):
        return patch_classes(classes, lambda: change(read_step()))

    return patched


STEPS = {
    "nothing": lambda step: StepContext(),
    "always the first": lambda step: FIRST,
    "always a later one": lambda step: LATER,
    "the opposite": lambda step: StepContext(
        None if step.first_microbatch is None else not step.first_microbatch
    ),
    "the first where it is off": lambda step: FIRST if step.first_microbatch is None else step,
}


@pytest.mark.parametrize("change", STEPS.values(), ids=STEPS)
def test_a_forward_that_is_given_another_step_is_told(stand_in, change):
    stand_in("patch", "patch_classes", passing(change))
    with pytest.raises(AssertionError, match="first_microbatch"):
        check_patch_passes_step(EVENTS)


def test_a_recompute_that_is_given_the_step_of_the_backward_is_told(stand_in):
    scopes = []

    class Recording(step_context):
        __slots__ = ()

        def __enter__(self):
            scopes.append(super().__enter__())
            return scopes[-1]

        def __exit__(self, *exc):
            scopes.pop()
            return super().__exit__(*exc)

    stand_in("patch", "step_context", Recording)
    stand_in(
        "patch",
        "patch_classes",
        lambda classes, _: patch_classes(classes, lambda: scopes[-1] if scopes else StepContext()),
    )
    check_patch_passes_step([FIRST, "forward", LATER, "forward", "leave", "forward"])
    with pytest.raises(AssertionError, match="recompute"):
        check_patch_passes_step(
            [FIRST, "forward", "leave", LATER, "checkpoint", "leave", "backward"]
        )


def test_a_step_that_beats_the_callers_argument_is_told(stand_in):
    def beating(classes, read_step):
        forward = classes.linear.forward

        def wrapped(self, inp, is_first_microbatch=None):
            return forward(self, inp, read_step().first_microbatch)

        classes.linear.forward = wrapped
        return patch_classes(classes, StepContext)

    stand_in("patch", "patch_classes", beating)
    with pytest.raises(AssertionError, match="first_microbatch=None"):
        check_patch_passes_step([FIRST, "forward", "change", LATER, None])


def test_what_is_no_event_is_told():
    with pytest.raises(AssertionError, match="'fwd' is no event"):
        check_patch_passes_step(["fwd"])
