import importlib
import importlib.metadata
import logging
import sys
import types
import warnings
from contextlib import contextmanager, suppress

import attrs
import pytest
import torch

from automodel_fn.compat import nemo
from automodel_fn.testing import te_stand_ins

ORIGINAL = "nemo_automodel.components.models.common.utils"


def _imported():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(ORIGINAL)


@pytest.fixture(scope="session", autouse=True)
def _original_comes_first():
    """It asks at its import whether Transformer Engine is installed: before there are stand-ins."""
    with suppress(ImportError):
        _imported()


@pytest.fixture(scope="session")
def original():
    """The module of nemo-automodel 0.7.0, to compare with."""
    try:
        installed = importlib.metadata.version("nemo-automodel")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("nemo-automodel 0.7.0, which is compared with, is not installed")
    if installed != "0.7.0":
        pytest.skip(f"nemo-automodel is {installed}; 0.7.0 is what compat has the results of")
    try:
        return _imported()
    except ImportError as error:
        pytest.skip(f"nemo-automodel 0.7.0 is installed and cannot be imported: {error}")


@pytest.fixture(params=["ours", "the original"])
def module(request):
    """Ours and the original, for what both must do."""
    return nemo if request.param == "ours" else request.getfixturevalue("original")


def _reset(module):
    module.set_is_first_microbatch(None)
    module.set_is_optim_step(False)


@pytest.fixture(autouse=True)
def _flags_end_with_the_test():
    yield
    for module in (nemo, sys.modules.get(ORIGINAL)):
        if module is not None:
            _reset(module)


@contextmanager
def _recording(module):
    records = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = records.append
    level, propagate = module.logger.level, module.logger.propagate
    module.logger.setLevel(logging.DEBUG)
    module.logger.propagate = False
    module.logger.addHandler(handler)
    try:
        yield records
    finally:
        module.logger.removeHandler(handler)
        module.logger.setLevel(level)
        module.logger.propagate = propagate


@attrs.frozen
class Outcome:
    """What a call came to: its result or the builtin kind of its error, and what it said."""

    value: object = attrs.field(eq=False)
    error: str | None
    log_levels: tuple
    warned: tuple
    message: str = attrs.field(eq=False, default="")


BUILTIN = (ImportError, TypeError, KeyError, AttributeError, RuntimeError, ValueError)


@pytest.fixture(scope="session")
def outcome():
    def of(module, call):
        value, error, message = None, None, ""
        with _recording(module) as records, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                value = call(module)
            except BUILTIN as raised:
                error = next(kind.__name__ for kind in BUILTIN if isinstance(raised, kind))
                message = str(raised)
        levels = tuple(record.levelno for record in records)
        return Outcome(value, error, levels, tuple(w.category.__name__ for w in warned), message)

    return of


@pytest.fixture
def transformer_engine(monkeypatch):
    """Stand-ins in the place of Transformer Engine, for both modules, and what is asked of it."""
    classes = te_stand_ins()

    class RMSNorm(classes.rms_norm):
        def __init__(self, normalized_shape, eps=1e-5, device=None, params_dtype=None):
            super().__init__(normalized_shape, eps=eps, device=device, dtype=params_dtype)

    made = {
        name: types.ModuleType(f"transformer_engine{name}")
        for name in ("", ".pytorch", ".pytorch.module", ".common", ".common.recipe")
    }
    for name in (".linear", ".grouped_linear", ".rmsnorm"):
        made[f".pytorch.module{name}"] = types.ModuleType(
            f"transformer_engine.pytorch.module{name}"
        )
    made[".pytorch.quantization"] = types.ModuleType("transformer_engine.pytorch.quantization")
    for name, module in made.items():
        module.__path__ = []
        monkeypatch.setitem(sys.modules, f"transformer_engine{name}", module)
    classes = attrs.evolve(classes, rms_norm=RMSNorm)
    for cls in attrs.astuple(classes, recurse=False):
        setattr(made[".pytorch"], cls.__name__, cls)
    made[".pytorch.module.linear"].Linear = classes.linear
    made[".pytorch.module.grouped_linear"].GroupedLinear = classes.grouped_linear
    made[".pytorch.module.rmsnorm"].RMSNorm = classes.rms_norm
    return types.SimpleNamespace(
        classes=classes,
        recipe=made[".common.recipe"],
        quantization=made[".pytorch.quantization"],
    )


@pytest.fixture
def uncompiled():
    """The original's norm is compiled; here it is compared without a compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield
