import functools

import attrs
import pytest
import torch
from convert_families import OWN, batch_of, small_model
from torch._dynamo.utils import counters

from automodel_fn import apply, backend_plan
from automodel_fn.convert import _variants

# Dynamo looks at the gradient of what is no leaf, and PyTorch warns.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
ASKED = attrs.evolve(OWN, compile_attn=True)


@pytest.fixture(autouse=True)
def _without_code_generation(monkeypatch):
    """Graphs are what is counted here, and need no C++ compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    _variants._made.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    yield
    _variants._made.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize(("use_cache", "graphs"), [(False, 1), (True, 10)])
def test_every_layer_runs_compiled_however_many_there_are(use_cache, graphs):
    model, own = (small_model("llama", num_hidden_layers=10) for _ in range(2))
    apply(backend_plan(model, ASKED))
    batch = batch_of("llama")
    loss = model(**batch, use_cache=use_cache).loss
    loss.backward()

    assert counters["stats"]["unique_graphs"] == graphs
    assert counters["frames"]["total"] == counters["frames"]["ok"] == graphs
    torch.testing.assert_close(loss, own(**batch).loss)


def test_inside_of_a_compiled_model_it_is_part_of_its_graph():
    model, own, batch = small_model("llama"), small_model("llama"), batch_of("llama")
    apply(backend_plan(model, ASKED))
    found = torch.compile(model, fullgraph=True)(**batch).logits

    torch.testing.assert_close(found, own(**batch).logits)
    assert counters["stats"]["unique_graphs"] == 1
