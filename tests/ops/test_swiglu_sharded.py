import pytest

SOURCE = """
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from automodel_fn import rms_norm_fp32, swiglu

gate, up, upstream = torch.randn(3, 4, 6, 8).unbind()
weight = torch.randn(8)


def gated(gate, up):
    return swiglu(gate, up)


def normed(x, residual):
    y, total = rms_norm_fp32(x, weight_of(x), 1e-5, residual=residual)
    return y + total


def weight_of(x):
    return scale if hasattr(x, "placements") else weight


scale = distribute_tensor(weight, mesh, [Replicate()])
for function, places in ((gated, 3), (normed, 2)):
    used = function
    if {is_compiled}:
        used = torch.compile(function, backend="aot_eager", fullgraph=True)
    plain = [tensor.clone().requires_grad_() for tensor in (gate, up)]
    expected = function(*plain)
    expected.backward(upstream)
    for place in (Replicate(), *(Shard(dim) for dim in range(places))):
        torch._dynamo.reset()
        spread = [distribute_tensor(half, mesh, [place]).requires_grad_() for half in (gate, up)]
        found = used(*spread)
        assert found.placements == (place,), place
        assert torch.equal(found.full_tensor(), expected), place
        found.backward(distribute_tensor(upstream, mesh, [place]))
        for leaf, other in zip(spread, plain, strict=True):
            torch.testing.assert_close(leaf.grad.full_tensor(), other.grad)
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled", [False, True])
def test_shards_give_what_the_whole_gives(on_two_ranks, is_compiled):
    on_two_ranks(SOURCE.format(is_compiled=is_compiled))
