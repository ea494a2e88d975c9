"""A model that is changed inside torch.inference_mode can still be trained."""

import pytest
import torch
from torch import nn

from automodel_fn import apply, bf16, cast_plan, fp32, restore, snapshot, temporary_cast


def _apply(model):
    apply(cast_plan(model, bf16))


def _undo(model):
    apply(cast_plan(model, bf16), keep_originals=True).undo()


def _restore(model):
    restore(snapshot(model))


def _temporary(model):
    with temporary_cast(model, bf16):
        nn.init.ones_(model[0].weight)


def _then(model):
    with temporary_cast(model, fp32, then=bf16):
        nn.init.ones_(model[0].weight)


@pytest.mark.parametrize("effect", [_apply, _undo, _restore, _temporary, _then])
def test_a_model_that_is_changed_in_inference_mode_can_be_trained(effect):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    with torch.inference_mode():
        effect(model)

    for tensor in (*model.parameters(), *model.buffers()):
        assert not tensor.is_inference()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 4, dtype=model[0].weight.dtype)).sum().backward()
    optimizer.step()
