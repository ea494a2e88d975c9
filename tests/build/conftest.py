import sys
import types

import pytest
import torch

from automodel_fn.te import _record
from automodel_fn.testing import te_stand_ins


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
def no_transformer_engine(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)


@pytest.fixture
def filled():
    """A module that was made on meta, with memory and with the values of a seed."""

    def fill(module, seed=0):
        assert all(tensor.is_meta for tensor in module.parameters())
        module.to_empty(device="cpu")
        torch.manual_seed(seed)
        module.reset_parameters()
        return module

    return fill
