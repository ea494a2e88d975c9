import pytest

SOURCE = """
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from automodel_fn import lm_head_loss

hidden, weight, bias = torch.randn(4, 6, 8), torch.randn(11, 8), torch.randn(11)
labels = torch.randint(0, 11, (4, 6))
labels[0, 2] = labels[3, 5] = -100
reduction, is_compiled = {reduction!r}, {is_compiled}
options = dict(reduction=reduction, shift=True, z_loss=0.1, label_smoothing=0.1)
upstream = torch.rand(4, 6) if reduction == "none" else torch.tensor(3.0)


def loss(hidden, weight, bias, labels):
    found = lm_head_loss(hidden, weight, labels, bias=bias, **options)
    return found.loss, found.z_loss, found.num_tokens


used = torch.compile(loss, backend="aot_eager", fullgraph=True) if is_compiled else loss
plain = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
expected = loss(*plain, labels)
expected[0].backward(upstream)
for place in (Replicate(), Shard(0), Shard(1)):
    torch._dynamo.reset()
    places = (place, Replicate(), Replicate())
    spread = [
        distribute_tensor(tensor, mesh, [where]).requires_grad_()
        for tensor, where in zip((hidden, weight, bias), places)
    ]
    found = used(*spread, distribute_tensor(labels, mesh, [place]))
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours.full_tensor(), theirs)
    where = place if reduction == "none" else Replicate()
    found[0].backward(distribute_tensor(upstream, mesh, [where]))
    for ours, theirs in zip(spread, plain):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
"""

GATHERED = """
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Shard, distribute_tensor
from automodel_fn import lm_head_loss

hidden, weight = torch.randn(2, 6, 8), torch.randn(12, 8)
labels = torch.randint(0, 12, (2, 6))
plain = weight.clone().requires_grad_()
for row in range(2):
    lm_head_loss(hidden[row], plain, labels[row]).loss.backward()

sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
whole = sharded.full_tensor(grad_placements=[Partial("avg")])
lm_head_loss(hidden[rank], whole, labels[rank]).loss.backward()
torch.testing.assert_close(sharded.grad.full_tensor(), plain.grad / 2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(8, 12, bias=False)

    def forward(self, hidden, labels):
        return lm_head_loss(hidden, self.lm_head.weight, labels)


model = Model()
with torch.no_grad():
    model.lm_head.weight.copy_(weight)
fully_shard(model, mesh=mesh)
model(hidden[rank], labels[rank]).loss.backward()
torch.testing.assert_close(model.lm_head.weight.grad.full_tensor(), plain.grad / 2)
"""

ERRORS = """
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from automodel_fn import ConfigError, lm_head_loss

hidden, weight, labels = torch.randn(6, 8), torch.randn(12, 8), torch.zeros(6, dtype=torch.int64)
spread = [distribute_tensor(tensor, mesh, [Replicate()]) for tensor in (hidden, labels)]
for dim in (0, 1):
    sharded = distribute_tensor(weight, mesh, [Shard(dim)])
    try:
        lm_head_loss(spread[0], sharded, spread[1])
    except ConfigError as error:
        assert "weight is sharded over its mesh" in str(error), error
    else:
        raise AssertionError("a sharded weight was taken")
try:
    lm_head_loss(spread[0], weight, spread[1])
except ConfigError as error:
    assert "hidden_states and labels are DTensors, weight is not" in str(error), error
else:
    raise AssertionError("a plain weight was taken beside DTensors")
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_tokens_spread_over_ranks_give_what_the_whole_gives(on_two_ranks, reduction, is_compiled):
    on_two_ranks(SOURCE.format(reduction=reduction, is_compiled=is_compiled))


@pytest.mark.slow
def test_a_sharded_vocabulary_and_mixed_tensors_are_errors(on_two_ranks):
    on_two_ranks(ERRORS)


@pytest.mark.slow
def test_a_weight_that_was_gathered_gets_the_mean_of_the_gradients_of_all_ranks(on_two_ranks):
    on_two_ranks(GATHERED)
