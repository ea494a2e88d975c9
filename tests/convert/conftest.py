import logging
import sys
import types
from pathlib import Path

import pytest
import torch

from automodel_fn.backend import Availability, Device, Package
from automodel_fn.te import _record
from automodel_fn.testing import te_stand_ins

# With --import-mode=importlib a test folder is not on the path; the families' file lies in it.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _quiet():
    """Small configs do not fit the defaults beside them, and transformers says so."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The models are so small that threads cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
def classes(monkeypatch):
    """Stand-ins in the place of Transformer Engine."""
    record = te_stand_ins()
    module = types.ModuleType("transformer_engine.pytorch")
    vars(module).update({cls.__name__: cls for _, cls in record.items()})
    package = types.ModuleType("transformer_engine")
    package.pytorch = module
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    remembered = dict(_record.aware)
    yield record
    _record.aware.clear()
    _record.aware.update(remembered)


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
