import copy
import inspect
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from automodel_fn import PatchError, current_step, step_context
from automodel_fn.te import _record
from automodel_fn.te._aware import step_aware
from automodel_fn.te._patch import patch_classes
from automodel_fn.testing import te_stand_ins

both_modes = pytest.mark.parametrize("use_reentrant", [True, False])

# Pickle finds a class by its name, as it does Transformer Engine's.
Linear, RMSNorm = te_stand_ins().linear, te_stand_ins().rms_norm
for _cls in (Linear, RMSNorm):
    _cls.__module__, _cls.__qualname__ = __name__, _cls.__name__


@pytest.fixture(autouse=True)
def _nothing_is_remembered():
    before = dict(_record.aware)
    yield
    _record.aware.clear()
    _record.aware.update(before)


@pytest.fixture
def aware(classes):
    return step_aware(classes.linear, "linear")


@pytest.fixture
def layer(aware):
    return aware(4, 6)


@pytest.fixture
def x():
    return torch.ones(1, 4)


def test_a_module_sees_the_step_without_a_patch(layer, x):
    for first in (True, False, False):
        with step_context(first_microbatch=first):
            layer(x)
    assert layer.num_quantizations == 1
    layer(x)
    assert layer.num_quantizations == 2


def test_the_class_stays_as_it_is(classes, class_dicts, x):
    before = class_dicts(classes)
    for field, cls in classes.items():
        step_aware(cls, field)
    assert class_dicts(classes) == before
    plain = classes.linear(4, 6)
    with step_context(first_microbatch=True):
        plain(x)
    assert not plain._fp8_workspaces


def test_the_subclass_looks_like_its_class(classes):
    for field, cls in classes.items():
        made = step_aware(cls, field)
        assert issubclass(made, cls)
        assert made is not cls
        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(made, name) == getattr(cls, name)
        assert inspect.signature(made.forward) == inspect.signature(cls.forward)
        assert inspect.signature(made) == inspect.signature(cls)


def test_a_module_has_the_state_and_the_text_of_its_class(classes, layer):
    torch.manual_seed(0)
    plain = classes.linear(4, 6)
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert repr(layer) == repr(plain)
    assert isinstance(layer, classes.linear)
    layer.load_state_dict(plain.state_dict())
    assert all(map(torch.equal, layer.parameters(), plain.parameters()))


def test_a_subclass_is_made_once(classes, in_thread):
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(lambda _: step_aware(classes.linear, "linear"), range(16)))
    assert len(made) == 1
    assert step_aware(te_stand_ins().linear, "linear") not in made


def test_an_argument_of_the_caller_wins(layer, x):
    with step_context(first_microbatch=True):
        layer(x, None)
        assert not layer._fp8_workspaces
        layer(x, is_first_microbatch=None)
        assert not layer._fp8_workspaces
        layer(x, False)
        assert layer._fp8_workspaces


def test_shapes_are_inferred_without_memory(aware, classes):
    layer = aware(4, 6, return_bias=True, device="meta")
    out, bias = layer(torch.ones(3, 4, device="meta", requires_grad=True))
    assert (out.shape, bias.shape, out.is_meta) == ((3, 6), (6,), True)
    assert out.grad_fn is not None
    norm = step_aware(classes.rms_norm, "rms_norm")(4)
    assert norm(torch.ones(3, 4, device="meta")).is_meta


@pytest.mark.parametrize("is_patched_when_made", [True, False])
def test_together_with_the_patch_nothing_happens_twice(classes, x, is_patched_when_made):
    handle = patch_classes(classes, current_step) if is_patched_when_made else None
    layer = step_aware(classes.linear, "linear")(4, 6)
    if handle is None:
        handle = patch_classes(classes, current_step)
    with step_context(first_microbatch=True):
        layer(x)
        assert layer.num_quantizations == 1
        layer(x, is_first_microbatch=None)
        assert layer.num_quantizations == 2
    with step_context(first_microbatch=False):
        layer(x)
    assert layer.num_quantizations == 2
    assert layer(torch.ones(2, 4, device="meta")).shape == (2, 6)
    handle.remove()
    with step_context(first_microbatch=False):
        layer(x)
    assert layer.num_quantizations == 2


@both_modes
def test_a_recompute_passes_the_step_of_its_forward(layer, use_reentrant):
    inp = torch.ones(1, 4, requires_grad=True)
    with step_context(first_microbatch=True):
        out = checkpoint(layer, inp, use_reentrant=use_reentrant)
    layer._fp8_workspaces.clear()
    with step_context(first_microbatch=None):
        out.sum().backward()
    assert layer._fp8_workspaces


def test_a_forward_that_cannot_be_wrapped_is_an_error(classes):
    class Own(classes.linear):
        def forward(self, inp):
            return inp

    with pytest.raises(PatchError, match=r"Own\.forward has no parameter is_first_microbatch"):
        step_aware(Own, "linear")


# Copies.


def by_deepcopy(module):
    return copy.deepcopy(module)


def by_copy(module):
    return copy.copy(module)


def by_torch_save(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def by_pickle(protocol):
    def copied(module):
        return pickle.loads(pickle.dumps(module, protocol))

    return copied


COPIES = {
    "deepcopy": by_deepcopy,
    "copy": by_copy,
    "torch.save": by_torch_save,
    **{f"pickle {number}": by_pickle(number) for number in range(2, 6)},
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(
    ("cls", "field", "sizes"), [(Linear, "linear", (4, 6)), (RMSNorm, "rms_norm", (4,))]
)
def test_a_copy_is_of_the_same_class_and_has_the_same_values(copied, cls, field, sizes, x):
    module = step_aware(cls, field)(*sizes)
    module.extra = {"kept": [1, 2]}
    other = copied(module)
    assert type(other) is type(module)
    assert other.extra == module.extra
    assert list(other.state_dict()) == list(module.state_dict())
    assert torch.equal(other(x), module(x))
    assert other.weight is not module.weight or copied is by_copy


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_sees_the_step(copied, x):
    other = copied(step_aware(Linear, "linear")(4, 6))
    with step_context(first_microbatch=True):
        other(x)
    assert other._fp8_workspaces


def test_a_pickle_of_a_plain_module_stays_plain(x):
    step_aware(Linear, "linear")
    assert type(pickle.loads(pickle.dumps(Linear(4, 6)))) is Linear


class OwnLinear(step_aware(Linear, "linear")):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.own = 1


def test_a_subclass_of_ones_own_is_copied_as_itself(x):
    for copied in COPIES.values():
        other = copied(OwnLinear(4, 6))
        assert type(other) is OwnLinear
        assert other.own == 1
        assert torch.equal(other(x), copied(other)(x))
