from pathlib import Path

import pytest

FOLDER = str(Path(__file__).parent)

SHARDED = """
sys.path.insert(0, {folder!r})
import attrs
from convert_families import OWN, batch_of, small_model
from torch.distributed.fsdp import fully_shard
from automodel_fn import apply, backend_plan

backend = attrs.evolve(OWN, rms_norm="torch_fp32", rope_fusion=True, swiglu="fused", loss="fused")
batch = batch_of("llama")
own = small_model("llama")
own(**batch).loss.backward()
expected = {{name: p.grad for name, p in own.named_parameters()}}
model = small_model("llama")

def swap():
    return apply(backend_plan(model, backend))

def shard():
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    {head}
    fully_shard(model, mesh=mesh)

{order}
found = model(**batch)
assert found.logits is None
found.loss.backward()
for name, p in model.named_parameters():
    torch.testing.assert_close(p.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-6)
{after}
"""

COVERED = """
covered = [e for e in backend_plan(model, OWN).entries if "fully_shard" in e.reason]
assert {e.action for e in covered} == {"skip"}
assert "" in {e.name for e in covered}
"""


@pytest.mark.parametrize("head", ["", "fully_shard(model.lm_head, mesh=mesh)"])
@pytest.mark.parametrize(
    ("order", "after"),
    [
        ("swap()\nshard()", COVERED),
        ("shard()\nreport = swap()", "report.undo()\nassert model(**batch).logits is not None"),
    ],
)
def test_a_swapped_model_is_sharded_and_a_sharded_one_is_swapped(on_two_ranks, head, order, after):
    on_two_ranks(SHARDED.format(folder=FOLDER, head=head, order=order, after=after))
