import pytest
import torch
from torch import nn


def _named(value, **tensors):
    module = nn.Module()
    for name, tensor in tensors.items():
        setattr(module, name, nn.Parameter(torch.full(tensor, value)))
    return module


@pytest.fixture
def model():
    made = nn.ModuleDict({"norm": _named(1.001, weight=(3,)), "wo": _named(-0.001, weight=(3,))})
    made["wo"].tied = made["wo"].weight
    flat = torch.linspace(1.0, 2.0, 8)
    made.left, made.right = nn.Parameter(flat[:6]), nn.Parameter(flat[4:])
    made.wide = nn.Parameter(torch.tensor([1.0000000001], dtype=torch.float64))
    made["wo"].weight.grad = torch.ones(3)
    made._keep_in_fp32_modules = ["norm"]
    return made


@pytest.fixture
def stand_in(monkeypatch):
    def replace(module, name, value):
        monkeypatch.setattr(f"automodel_fn.testing._laws_{module}.{name}", value)

    return replace
