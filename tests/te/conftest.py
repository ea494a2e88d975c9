import importlib
import sys
import threading
import types
from functools import partial

import attrs
import pytest
import torch

from automodel_fn import current_step
from automodel_fn.te import _record
from automodel_fn.te._patch import patch_classes
from automodel_fn.testing import te_stand_ins

IN, OUT, HIDDEN, ROWS = 4, 6, 8, 5
SIZES = {
    "linear": (IN, OUT),
    "grouped_linear": (2, IN, OUT),
    "layer_norm_linear": (IN, OUT),
    "layer_norm_mlp": (IN, HIDDEN),
    "multihead_attention": (IN, 2),
    "transformer_layer": (IN, HIDDEN, 2),
    "rms_norm": (IN,),
    "layer_norm": (IN,),
}
MORE_INPUTS = {"grouped_linear": (torch.tensor([2, ROWS - 2]),)}


@pytest.fixture(autouse=True)
def _nothing_stays_wrapped():
    before = dict(_record._record)
    yield
    left = {cls: entry for cls, entry in _record._record.items() if cls not in before}
    for cls, entry in left.items():
        for holder in tuple(entry.holders):
            _record.release(cls, holder)
    assert left == {}


@pytest.fixture
def classes():
    return te_stand_ins()


@pytest.fixture
def patched(classes):
    with patch_classes(classes, current_step):
        yield classes


@pytest.fixture
def made():
    def make(classes, field, **options):
        torch.manual_seed(0)
        return getattr(classes, field)(*SIZES[field], **options)

    return make


@pytest.fixture
def called():
    def call(module, field, *inputs, **keywords):
        inp = inputs[0] if inputs else example(field)
        return module(inp, *MORE_INPUTS.get(field, ()), *inputs[1:], **keywords)

    return call


def example(field, device="cpu", dtype=torch.float32, requires_grad=False):
    shape = (ROWS, IN) if field == "grouped_linear" else (3, 2, IN)
    values = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)
    return values.to(device, dtype).requires_grad_(requires_grad)


@pytest.fixture(name="example")
def _example():
    return example


@pytest.fixture
def class_dicts():
    """The keys and objects of each class, in order; equal only if nothing at all changed."""

    def snapshot(classes):
        dicts = [vars(cls) for field, cls in classes.items()]
        return [[(key, id(value)) for key, value in held.items()] for held in dicts]

    return snapshot


@pytest.fixture
def in_thread():
    def run(function):
        got = []
        thread = threading.Thread(target=lambda: got.append(function()))
        thread.start()
        thread.join(timeout=60)
        assert got, "the thread did not finish"
        return got[0]

    return run


@pytest.fixture
def compiled_forward():
    torch._dynamo.reset()
    yield partial(torch.compile, fullgraph=True)
    torch._dynamo.reset()


@pytest.fixture
def transformer_engine(monkeypatch):
    """Put modules in the place of Transformer Engine: the classes of a record, by their names."""

    def install(classes, without=()):
        module = types.ModuleType("transformer_engine.pytorch")
        for field, cls in classes.items():
            if field not in without:
                setattr(module, cls.__name__, cls)
        package = types.ModuleType("transformer_engine")
        package.pytorch = module
        monkeypatch.setitem(sys.modules, "transformer_engine", package)
        monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
        return module

    return install


@pytest.fixture
def failing_import(monkeypatch):
    """Let the import of Transformer Engine raise."""
    original = importlib.import_module

    def let_raise(error):
        def import_module(name, package=None):
            if name.partition(".")[0] == "transformer_engine":
                raise error
            return original(name, package)

        monkeypatch.setattr(importlib, "import_module", import_module)

    return let_raise


@attrs.frozen
class Seen:
    args: tuple
    kwargs: dict


@pytest.fixture
def recording(classes):
    """The classes, with forwards of the same signatures that only tell what they were given."""
    seen = []

    def told(cls):
        forward = cls.forward

        def tell(self, *args, **kwargs):
            seen.append(Seen(args, kwargs))
            return args[0] if args else next(iter(kwargs.values()))

        tell.__signature__ = __import__("inspect").signature(forward)
        tell.__doc__ = f"The forward of {cls.__name__}."
        cls.forward = tell

    for cls in classes.stepping():
        told(cls)
    return classes, seen
