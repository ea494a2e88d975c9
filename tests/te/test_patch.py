import functools
import gc
import itertools
import re
import sys
import threading
import weakref

import attrs
import pytest
import torch
from torch import nn

from automodel_fn import (
    BackendUnavailableError,
    PatchError,
    PatchHandle,
    current_step,
    patch_te,
    step_context,
)
from automodel_fn.te import TEClasses, _record
from automodel_fn.te._patch import patch_classes
from automodel_fn.testing import te_stand_ins

FIELDS = [field.name for field in attrs.fields(TEClasses)]


@pytest.fixture
def patch(classes):
    return lambda: patch_classes(classes, current_step)


def is_wrapped(classes):
    wrapped = {
        "__wrapped__" in vars(vars(cls).get("forward", object)) for _, cls in classes.items()
    }
    assert len(wrapped) == 1
    return wrapped.pop()


# Handles.


def test_the_classes_are_wrapped_while_a_handle_is_left_and_as_before_after_it(
    classes, patch, class_dicts
):
    before = class_dicts(classes)
    handle = patch()
    assert is_wrapped(classes)
    assert handle.is_active
    handle.remove()
    assert class_dicts(classes) == before
    assert not handle.is_active


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_handles_are_given_back_in_any_order(classes, patch, class_dicts, order):
    before = class_dicts(classes)
    handles = [patch() for _ in order]
    during = class_dicts(classes)
    for left, place in zip((2, 1, 0), order, strict=True):
        handles[place].remove()
        assert class_dicts(classes) == (during if left else before)


def test_the_classes_are_wrapped_once_whatever_the_number_of_handles(classes, patch):
    original = classes.linear.forward
    with patch(), patch(), patch():
        assert classes.linear.forward.__wrapped__ is original


def test_removing_twice_is_removing_once(classes, patch, class_dicts):
    before = class_dicts(classes)
    first, second = patch(), patch()
    first.remove()
    first.remove()
    assert is_wrapped(classes)
    second.remove()
    second.remove()
    first.remove()
    assert class_dicts(classes) == before


def test_the_classes_can_be_wrapped_again(classes, patch, class_dicts):
    before = class_dicts(classes)
    for _ in range(3):
        with patch():
            assert is_wrapped(classes)
        assert class_dicts(classes) == before


def test_a_handle_is_a_context_manager_and_gives_itself(classes, patch, class_dicts):
    before = class_dicts(classes)
    with patch() as handle:
        assert isinstance(handle, PatchHandle)
        assert repr(handle) == "PatchHandle(is_active=True)"
    assert class_dicts(classes) == before
    assert repr(handle) == "PatchHandle(is_active=False)"


def test_an_error_inside_the_block_is_raised_and_the_classes_are_as_before(
    classes, patch, class_dicts
):
    before = class_dicts(classes)
    with pytest.raises(KeyError, match="mine"), patch():
        raise KeyError("mine")
    assert class_dicts(classes) == before


def test_a_handle_that_was_removed_inside_its_block_may_leave_it(classes, patch, class_dicts):
    before = class_dicts(classes)
    with patch() as handle:
        handle.remove()
        assert class_dicts(classes) == before
    assert class_dicts(classes) == before


def test_a_handle_can_be_given_back_in_another_thread(classes, patch, class_dicts, in_thread):
    before = class_dicts(classes)
    handle = in_thread(patch)
    assert is_wrapped(classes)
    in_thread(lambda: handle.remove() or True)
    assert class_dicts(classes) == before


def test_threads_that_patch_and_unpatch_leave_the_classes_as_before(classes, patch, class_dicts):
    before, wrong = class_dicts(classes), []
    turns = threading.Barrier(4, timeout=60)

    def work():
        turns.wait()
        for _ in range(50):
            with patch():
                if not is_wrapped(classes):
                    wrong.append("not wrapped")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert class_dicts(classes) == before


def test_norms_inherit_their_forward_again(classes, patch):
    inherited = classes.rms_norm.forward
    with patch():
        assert "forward" in vars(classes.rms_norm)
        assert "forward" in vars(classes.layer_norm)
    assert "forward" not in vars(classes.rms_norm)
    assert "forward" not in vars(classes.layer_norm)
    assert classes.rms_norm.forward is inherited


def test_modules_made_before_the_patch_see_it_and_lose_it(classes, patch, made):
    layer = made(classes, "linear")
    with step_context(first_microbatch=True):
        layer(torch.ones(1, 4))
        assert not layer._fp8_workspaces
        with patch():
            layer(torch.ones(1, 4))
        assert layer._fp8_workspaces
        layer._fp8_workspaces.clear()
        layer(torch.ones(1, 4))
    assert not layer._fp8_workspaces


def test_subclasses_of_a_patched_class_see_the_step(classes, patch):
    class Own(classes.linear):
        def forward(self, inp):
            return super().forward(inp) + 1

    layer = Own(4, 6)
    with patch(), step_context(first_microbatch=True):
        layer(torch.ones(1, 4))
    assert layer._fp8_workspaces


def test_two_records_of_classes_are_patched_apart(classes, class_dicts):
    others = te_stand_ins()
    before = class_dicts(others)
    with patch_classes(classes, current_step):
        assert class_dicts(others) == before


def test_classes_that_were_patched_are_not_kept_alive():
    classes = te_stand_ins()
    patch_classes(classes, current_step).remove()
    kept = [weakref.ref(cls) for _, cls in classes.items()]
    del classes
    gc.collect()
    assert [reference() for reference in kept] == [None] * len(kept)


# Someone else.


def wrap(cls):
    forward = cls.forward

    @functools.wraps(forward)
    def theirs(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    cls.forward = theirs
    return forward


@pytest.mark.parametrize("field", FIELDS)
def test_the_last_handle_is_not_given_back_from_under_a_wrapper_of_someone_else(
    classes, patch, class_dicts, field
):
    before = class_dicts(classes)
    handle, cls = patch(), getattr(classes, field)
    ours = wrap(cls)
    during = class_dicts(classes)
    for _ in range(2):
        with pytest.raises(PatchError, match=rf"1 of 8 forwards.*\n  {cls.__name__}.forward is"):
            handle.remove()
        assert handle.is_active
        assert class_dicts(classes) == during
    cls.forward = ours
    handle.remove()
    assert not handle.is_active
    assert class_dicts(classes) == before


def test_all_wrappers_of_someone_else_are_listed_at_once(classes, patch):
    handle = patch()
    ours = [(cls, wrap(cls)) for _, cls in classes.items()]
    with pytest.raises(PatchError, match="8 of 8 forwards") as caught:
        handle.remove()
    for cls, forward in ours:
        assert f"{cls.__name__}.forward is" in str(caught.value)
        cls.forward = forward
    handle.remove()


def test_an_earlier_handle_is_given_back_while_someone_else_is_on_top(classes, patch):
    first, last = patch(), patch()
    ours = wrap(classes.linear)
    first.remove()
    assert not first.is_active
    with pytest.raises(PatchError):
        last.remove()
    classes.linear.forward = ours
    last.remove()


def test_under_a_wrapper_of_someone_else_the_patch_is_still_in_force(classes, patch, made):
    with patch():
        ours = wrap(classes.linear)
        with patch():
            layer = made(classes, "linear")
            with step_context(first_microbatch=True):
                layer(torch.ones(1, 4))
        assert layer._fp8_workspaces
        classes.linear.forward = ours


@pytest.mark.parametrize("field", FIELDS)
def test_the_next_patch_says_that_ours_was_replaced(classes, patch, class_dicts, field):
    before = class_dicts(classes)
    handle, cls = patch(), getattr(classes, field)
    ours = vars(cls)["forward"]
    cls.forward = lambda self, inp: inp
    during = class_dicts(classes)
    with pytest.raises(PatchError, match=rf"1 of 8 forwards[^\n]*\n[^\n]*{cls.__name__}.forward"):
        patch()
    assert class_dicts(classes) == during
    cls.forward = ours
    patch().remove()
    handle.remove()
    assert class_dicts(classes) == before


def test_a_forward_that_someone_deleted_is_noticed(classes, patch):
    handle = patch()
    ours = vars(classes.rms_norm)["forward"]
    del classes.rms_norm.forward
    with pytest.raises(PatchError, match=r"RMSNorm\.forward"):
        handle.remove()
    with pytest.raises(PatchError, match=r"RMSNorm\.forward"):
        patch()
    classes.rms_norm.forward = ours
    handle.remove()


@pytest.mark.parametrize("field", FIELDS)
def test_a_wrapper_from_before_the_patch_is_back_after_it(classes, patch, made, class_dicts, field):
    cls = getattr(classes, field)
    original = wrap(cls)
    theirs, before = vars(cls)["forward"], class_dicts(classes)
    with patch():
        assert vars(cls)["forward"] is not theirs
    assert vars(cls)["forward"] is theirs
    assert class_dicts(classes) == before
    cls.forward = original


# All or nothing.


class Refusal(Exception):
    pass


class Refusing(type):
    """The `forward` of a class of this kind cannot be set while it is told to refuse."""

    refused = False

    def __setattr__(cls, name, value):
        if name == "forward" and vars(cls).get("refuses", False):
            raise Refusal(cls.__name__)
        super().__setattr__(name, value)


def refusing(classes, field, refuses=True):
    cls = getattr(classes, field)
    made = Refusing(cls.__name__, (cls,), {"refuses": refuses, "forward": cls.forward})
    return attrs.evolve(classes, **{field: made})


@pytest.mark.parametrize("field", FIELDS)
def test_a_class_that_cannot_be_changed_leaves_all_as_it_was(classes, class_dicts, field):
    classes = refusing(classes, field)
    before = class_dicts(classes)
    for _ in range(2):
        with pytest.raises(Refusal):
            patch_classes(classes, current_step)
        assert class_dicts(classes) == before
    cls = getattr(classes, field)
    type.__setattr__(cls, "refuses", False)
    with patch_classes(classes, current_step):
        assert is_wrapped(classes)
    type.__setattr__(cls, "refuses", True)
    assert class_dicts(classes) == before


@pytest.mark.parametrize("field", FIELDS)
def test_a_failure_while_another_holds_the_classes_takes_nothing_from_it(
    classes, class_dicts, field
):
    other = patch_classes(classes, current_step)
    during = class_dicts(classes)
    broken = attrs.evolve(te_stand_ins(), linear=classes.linear, rms_norm=classes.rms_norm)
    if field not in ("linear", "rms_norm"):
        with pytest.raises(Refusal):
            patch_classes(refusing(broken, field), current_step)
    assert class_dicts(classes) == during
    other.remove()


@pytest.mark.parametrize("place", range(8))
def test_an_interruption_between_two_classes_leaves_all_as_it_was(
    classes, class_dicts, monkeypatch, place
):
    before, take, calls = class_dicts(classes), _record.take, itertools.count()

    def interrupted(patched, holder):
        take(patched, holder)
        if next(calls) == place:
            raise KeyboardInterrupt

    monkeypatch.setattr("automodel_fn.te._patch.take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        patch_classes(classes, current_step)
    monkeypatch.undo()
    assert class_dicts(classes) == before


@pytest.mark.parametrize("place", range(8))
def test_an_interrupted_removal_can_be_finished(classes, patch, class_dicts, monkeypatch, place):
    before, handle = class_dicts(classes), patch()
    release, calls = _record.release, itertools.count()

    def interrupted(cls, holder):
        if next(calls) == place:
            raise KeyboardInterrupt
        release(cls, holder)

    monkeypatch.setattr("automodel_fn.te._patch.release", interrupted)
    with pytest.raises(KeyboardInterrupt):
        handle.remove()
    monkeypatch.undo()
    assert handle.is_active
    handle.remove()
    assert class_dicts(classes) == before


def test_a_forward_without_the_microbatch_is_an_error_and_nothing_is_patched(classes, class_dicts):
    class Old(classes.linear):
        def forward(self, inp):
            return inp

    class Hidden(classes.layer_norm_mlp):
        def forward(self, *args, **kwargs):
            return args

    wrong = attrs.evolve(classes, linear=Old, layer_norm_mlp=Hidden)
    before = class_dicts(wrong)
    with pytest.raises(PatchError, match="2 of 8 forwards") as caught:
        patch_classes(wrong, current_step)
    for text in ("Old.forward", "(self, inp)", "Hidden.forward", "is_first_microbatch"):
        assert text in str(caught.value)
    assert class_dicts(wrong) == before


# Transformer Engine itself, or something in its place.


def test_patch_te_patches_what_transformer_engine_has(classes, transformer_engine, class_dicts):
    transformer_engine(classes)
    before = class_dicts(classes)
    with patch_te():
        assert is_wrapped(classes)
        layer = classes.linear(4, 6)
        with step_context(first_microbatch=True):
            layer(torch.ones(1, 4))
        assert layer._fp8_workspaces
    assert class_dicts(classes) == before


def test_each_call_of_patch_te_has_its_own_handle(classes, transformer_engine):
    transformer_engine(classes)
    with patch_te() as outer:
        with patch_te() as inner:
            assert inner is not outer
        assert is_wrapped(classes)


def test_without_transformer_engine_patch_te_says_how_to_get_it(failing_import):
    failing_import(ModuleNotFoundError("No module named 'transformer_engine'"))
    with pytest.raises(BackendUnavailableError, match=r"Transformer Engine.*pip install") as caught:
        patch_te()
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize(
    "error",
    [
        OSError("libcudnn.so.9: cannot open shared object file"),
        ImportError("te.so: undefined symbol: _ZTVN5cudnn7backend12OperationSetE"),
        ImportError("cannot import name 'Linear' from 'transformer_engine.pytorch.module'"),
        ModuleNotFoundError("No module named 'pydantic'", name="pydantic"),
        RuntimeError("Found empty `transformer-engine` meta package installed."),
        AssertionError("Could not find shared object file."),
        FileNotFoundError("Could not find shared object file"),
        AttributeError("module 'torch' has no attribute 'x'"),
        RuntimeWarning("Detected a PyTorch installation"),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:20]}",
)
def test_an_import_that_fails_is_told_with_its_own_words(failing_import, error):
    failing_import(error)
    with pytest.raises(BackendUnavailableError, match="Transformer Engine") as caught:
        patch_te()
    said = str(caught.value)
    assert str(error).rstrip(".") in said
    assert type(error).__name__ in said
    assert ".." not in said
    assert "is installed" in said
    assert caught.value.__cause__ is error


def test_an_interrupted_import_is_an_interruption(failing_import):
    failing_import(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        patch_te()


def test_an_import_that_works_later_works_later(
    classes, transformer_engine, failing_import, monkeypatch
):
    with monkeypatch.context() as now:
        now.setitem(sys.modules, "transformer_engine", None)
        now.setitem(sys.modules, "transformer_engine.pytorch", None)
        with pytest.raises(BackendUnavailableError):
            patch_te()
    transformer_engine(classes)
    with patch_te():
        assert is_wrapped(classes)


SOURCE = """
import transformer_engine.common
import os
if "IS_BROKEN" in os.environ:
    raise OSError("libcudnn.so.9: cannot open shared object file")
from automodel_fn.testing import te_stand_ins
for _, made in te_stand_ins().items():
    globals()[made.__name__] = made
"""


def test_an_import_that_broke_half_way_can_be_repeated_in_the_same_process(tmp_path, monkeypatch):
    package = tmp_path / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "common.py").touch()
    (package / "pytorch" / "__init__.py").write_text(SOURCE)
    for name in [name for name in sys.modules if name.partition(".")[0] == package.name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("IS_BROKEN", "1")
    try:
        for _ in range(2):
            with pytest.raises(BackendUnavailableError, match="libcudnn"):
                patch_te()
        monkeypatch.delenv("IS_BROKEN")
        with patch_te():
            module = sys.modules["transformer_engine.pytorch"]
            layer = module.Linear(4, 6)
            with step_context(first_microbatch=True):
                layer(torch.ones(1, 4))
            assert layer._fp8_workspaces
            layer._fp8_workspaces.clear()
        assert "__wrapped__" not in vars(module.Linear.forward)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == package.name]:
            del sys.modules[name]


@pytest.mark.parametrize("field", FIELDS)
def test_a_transformer_engine_that_lacks_a_class_is_too_old(
    classes, transformer_engine, class_dicts, field
):
    transformer_engine(classes, without=(field,))
    before, name = class_dicts(classes), getattr(classes, field).__name__
    with pytest.raises(BackendUnavailableError, match=rf"has no {name};.*2\.0 or newer"):
        patch_te()
    assert class_dicts(classes) == before


def test_all_missing_classes_are_named_at_once(classes, transformer_engine):
    transformer_engine(classes, without=("linear", "rms_norm"))
    with pytest.raises(BackendUnavailableError, match=re.escape("has no Linear, RMSNorm;")):
        patch_te()


def test_the_record_of_classes_is_a_value(classes):
    assert len(classes.stepping()) == 6
    assert classes.rms_norm not in classes.stepping()
    assert [field for field, _ in classes.items()] == FIELDS
    assert all(issubclass(cls, nn.Module) for _, cls in classes.items())
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        classes.linear = nn.Linear
