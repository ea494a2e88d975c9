import threading
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from automodel_fn import ConfigError, ScopeError, StepContext, current_step, step_context
from automodel_fn.compat import nemo

MODULE = "automodel_fn.compat.nemo"
FLAGS = {
    "IS_FIRST_MICROBATCH": (nemo.set_is_first_microbatch, nemo.get_is_first_microbatch, None),
    "IS_OPTIM_STEP": (nemo.set_is_optim_step, nemo.get_is_optim_step, False),
}
VALUES = [
    *(("IS_FIRST_MICROBATCH", value) for value in (None, True, False)),
    *(("IS_OPTIM_STEP", value) for value in (True, False)),
]


def in_thread(function):
    got = []
    thread = threading.Thread(target=lambda: got.append(function()))
    thread.start()
    thread.join(timeout=60)
    return got[0]


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_off_until_it_is_set(name):
    _, get, off = FLAGS[name]
    assert get() is getattr(nemo, name) is off


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_what_is_set_is_read_by_function_and_by_attribute(name, value):
    write, get, _ = FLAGS[name]
    write(value)
    assert get() is getattr(nemo, name) is value


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_an_attribute_that_is_set_is_the_flag(name, value):
    _, get, _ = FLAGS[name]
    setattr(nemo, name, value)
    assert get() is getattr(nemo, name) is value


def test_the_flags_do_not_touch_each_other():
    nemo.set_is_first_microbatch(False)
    nemo.set_is_optim_step(True)
    assert current_step() == StepContext(False, optim_step=True)
    nemo.set_is_first_microbatch(None)
    assert nemo.IS_OPTIM_STEP is True


def test_a_step_context_inherits_from_the_flags_and_gives_them_back():
    nemo.set_is_first_microbatch(True)
    with step_context(optim_step=True):
        assert (nemo.IS_FIRST_MICROBATCH, nemo.IS_OPTIM_STEP) == (True, True)
    assert (nemo.IS_FIRST_MICROBATCH, nemo.IS_OPTIM_STEP) == (True, False)


def test_setup_functions_of_a_training_loop_have_their_effect():
    seen = []
    for _ in range(2):
        nemo.set_is_optim_step(False)
        nemo.set_is_first_microbatch(True)
        for index in range(3):
            if index == 2:
                nemo.set_is_optim_step(True)
            seen.append((nemo.get_is_first_microbatch(), nemo.get_is_optim_step()))
            if index == 0:
                nemo.set_is_first_microbatch(False)
    assert seen == 2 * [(True, False), (False, False), (False, True)]


@pytest.mark.parametrize("before", [None, True, False])
@pytest.mark.parametrize("within", [None, True, False])
def test_mock_patch_sets_a_flag_and_sets_it_back(before, within):
    nemo.set_is_first_microbatch(before)
    with mock.patch(f"{MODULE}.IS_FIRST_MICROBATCH", within):
        assert nemo.get_is_first_microbatch() is within
    assert nemo.get_is_first_microbatch() is nemo.IS_FIRST_MICROBATCH is before
    with pytest.raises(OSError, match="within"), mock.patch.object(nemo, "IS_OPTIM_STEP", True):
        raise OSError("within")
    assert nemo.get_is_optim_step() is False


def test_monkeypatch_sets_a_flag_and_sets_it_back():
    nemo.set_is_first_microbatch(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nemo, "IS_FIRST_MICROBATCH", True)
        patch.setattr(f"{MODULE}.IS_OPTIM_STEP", True)
        assert current_step() == StepContext(True, optim_step=True)
    assert current_step() == StepContext(False)


def test_a_deleted_flag_is_missing_until_it_is_set():
    del nemo.IS_OPTIM_STEP
    assert not hasattr(nemo, "IS_OPTIM_STEP")
    with pytest.raises(AttributeError, match="IS_OPTIM_STEP"):
        del nemo.IS_OPTIM_STEP
    nemo.IS_OPTIM_STEP = True
    assert nemo.IS_OPTIM_STEP is nemo.get_is_optim_step() is True


def test_other_attributes_are_patched_as_those_of_any_module():
    before = nemo.HAVE_TE
    with mock.patch(f"{MODULE}.HAVE_TE", "patched"):
        assert nemo.HAVE_TE == "patched"
    assert nemo.HAVE_TE is before
    nemo.of_a_test = 1
    del nemo.of_a_test
    assert not hasattr(nemo, "of_a_test")


@pytest.mark.parametrize("name", FLAGS)
def test_another_thread_sees_the_original_flag_and_not_ours(name, original):
    write, get, off = FLAGS[name]
    getattr(original, f"set_{name.lower()}")(True)
    write(True)
    assert in_thread(getattr(original, f"get_{name.lower()}")) is True
    assert in_thread(get) is off


def test_what_a_thread_sets_ends_with_it():
    in_thread(lambda: nemo.set_is_first_microbatch(True))
    assert nemo.get_is_first_microbatch() is None


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_inside_a_step_context_setting_is_refused_where_the_original_sets(name, value, original):
    write, get, off = FLAGS[name]
    with step_context():
        with pytest.raises(ScopeError, match="inside the scope"):
            write(value)
        with pytest.raises(ScopeError, match="inside the scope"):
            setattr(nemo, name, value)
        getattr(original, f"set_{name.lower()}")(value)
    assert get() is off
    assert getattr(original, name) is value


def seen_in_recompute(module):
    seen = []

    def block(x):
        seen.append(module.get_is_first_microbatch())
        return x.exp()

    module.set_is_first_microbatch(True)
    out = checkpoint(block, torch.ones(2, requires_grad=True), use_reentrant=False)
    module.set_is_first_microbatch(False)
    out.sum().backward()
    return seen


def test_a_recompute_sees_the_flag_of_its_forward_where_the_original_shows_the_newest(original):
    assert seen_in_recompute(nemo) == [True, True]
    assert seen_in_recompute(original) == [True, False]


@pytest.mark.parametrize("value", [1, 0, "True", "", mock.sentinel.any])
@pytest.mark.parametrize("name", FLAGS)
def test_a_value_of_another_type_is_refused_where_the_original_keeps_it(name, value, original):
    write, get, off = FLAGS[name]
    with pytest.raises(ConfigError, match="must be True"):
        write(value)
    with pytest.raises(ConfigError, match="must be True"):
        setattr(nemo, name, value)
    assert get() is off
    getattr(original, f"set_{name.lower()}")(value)
    assert getattr(original, name) is value


def test_an_optim_step_is_never_none():
    with pytest.raises(ConfigError, match="optim_step=None"):
        nemo.set_is_optim_step(None)
