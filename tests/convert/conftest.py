import sys
import types
from pathlib import Path

import attrs
import pytest

from automodel_fn import backend_plan
from automodel_fn.backend import Availability, Device, Package
from automodel_fn.convert import _variants

# With --import-mode=importlib a test folder is not on the path; the families' file lies in it.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _for_small_models(quiet_transformers, one_thread):
    """All models here are small ones of transformers."""


@pytest.fixture
def gpu():
    """A machine on which everything can run that needs one rank."""
    return Availability(
        python="3.12.3",
        torch="2.11.0",
        cuda="12.9",
        devices=(Device("H100", capability=(9, 0), memory_bytes=80 << 30),),
        packages=(Package("transformer-engine", version="2.20.2"),),
    )


@pytest.fixture
def classes(installed_stand_ins):
    return installed_stand_ins


@pytest.fixture
def state():
    """All that a swap may not change, or has to bring back."""

    def read(model):
        return {
            name: (
                type(module),
                dict(vars(module)),
                {key: id(value) for key, value in module._parameters.items()},
                getattr(getattr(module, "config", None), "_attn_implementation", None),
                getattr(getattr(module, "config", None), "_experts_implementation", None),
            )
            for name, module in model.named_modules()
        }

    return read


@pytest.fixture
def exact(classes, monkeypatch):
    """A Transformer Engine without FP8: weights are what they are."""
    monkeypatch.setattr(
        classes.grouped_linear, "quantized", lambda self, name, _, dtype: getattr(self, name)
    )


@pytest.fixture
def machine(gpu):
    return attrs.evolve(gpu, packages=(*gpu.packages, Package("grouped_gemm", version="0.3")))


@pytest.fixture
def planned(machine):
    from convert_families import OWN

    def plan(model, choice, **options):
        return backend_plan(
            model, attrs.evolve(OWN, attn="eager", experts=choice), availability=machine, **options
        )

    return plan


@pytest.fixture
def autocasts(classes, monkeypatch):
    """Transformer Engine's autocast, which writes down when it is entered and left."""
    entered = []

    class Autocast:
        def __init__(self, enabled, recipe):
            self.recipe = recipe

        def __enter__(self):
            entered.append(self.recipe)

        def __exit__(self, *_):
            entered.append("left")

    quantization = types.ModuleType("transformer_engine.pytorch.quantization")
    quantization.autocast = Autocast
    recipes = types.ModuleType("transformer_engine.common.recipe")
    recipes.Float8CurrentScaling = lambda: "current"
    package = sys.modules["transformer_engine"]
    monkeypatch.setattr(package, "__version__", "2.20.2", raising=False)
    monkeypatch.setitem(sys.modules, quantization.__name__, quantization)
    monkeypatch.setitem(sys.modules, "transformer_engine.common", types.ModuleType("common"))
    monkeypatch.setitem(sys.modules, recipes.__name__, recipes)
    usable = types.SimpleNamespace(can_run=True, reason="can run")
    monkeypatch.setattr(Availability, "verdict", lambda *_: usable)
    # A class that was made in another test enters that test's autocast.
    _variants._made.cache_clear()
    yield entered
    _variants._made.cache_clear()
