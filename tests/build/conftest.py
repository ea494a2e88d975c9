import sys

import pytest
import torch


@pytest.fixture
def classes(installed_stand_ins):
    return installed_stand_ins


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
