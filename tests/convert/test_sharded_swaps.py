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

BACK = """
classes = [type(each) for each in model.modules()]
report.undo()
plain = small_model("llama")
model, swapped = plain, model
shard()
assert [type(each) for each in swapped.modules()] == [type(each) for each in plain.modules()]
for each in (swapped, plain):
    each.zero_grad()
    output = each(**batch)
    assert output.logits is not None
    output.loss.backward()
for ours, theirs in zip(swapped.parameters(), plain.parameters(), strict=True):
    assert torch.equal(ours.grad.to_local(), theirs.grad.to_local())
model = swapped
swap()
assert [type(each) for each in model.modules()] == classes
assert model(**batch).logits is None
"""
PLANNED = """
plan = backend_plan(model, backend)
shard()
report = apply(plan)
"""


@pytest.mark.parametrize("head", ["", "fully_shard(model.lm_head, mesh=mesh)"])
@pytest.mark.parametrize(
    ("order", "after"),
    [
        ("report = swap()\nshard()", BACK),
        (PLANNED, "report.undo()\nassert model(**batch).logits is not None"),
        ("shard()\nreport = swap()", "report.undo()\nassert model(**batch).logits is not None"),
    ],
)
def test_a_swapped_model_is_sharded_and_a_sharded_one_is_swapped(on_two_ranks, head, order, after):
    on_two_ranks(SHARDED.format(folder=FOLDER, head=head, order=order, after=after))


OTHERS = """
sys.path.insert(0, {folder!r})
import attrs
from convert_families import OWN, batch_of, small_model
from torch.distributed.fsdp import fully_shard
from automodel_fn import apply, backend_plan

batch = batch_of("llama")
model, plain = small_model("llama"), small_model("llama")
reports = [apply(backend_plan(model, attrs.evolve(OWN, rms_norm="torch_fp32")))]
for each in (model, plain):
    for norm in (each.model.norm, *(layer.input_layernorm for layer in each.model.layers)):
        fully_shard(norm, mesh=mesh)
    fully_shard(each, mesh=mesh)
reports.append(apply(backend_plan(model, attrs.evolve(OWN, rms_norm="torch_fp32", loss="fused"))))
reports.append(apply(backend_plan(model, attrs.evolve(OWN, swiglu="fused"))))
assert model(**batch).loss is not None
for report in reversed(reports):
    report.undo()
assert [type(each) for each in model.modules()] == [type(each) for each in plain.modules()]
assert torch.equal(model(**batch).logits, plain(**batch).logits)
assert set(model.state_dict()) == set(plain.state_dict())
"""


def test_swaps_before_and_after_sharding_are_taken_back_in_turn(on_two_ranks):
    on_two_ranks(OTHERS.format(folder=FOLDER))
