import pytest

SOURCE = """
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from automodel_fn import rms_norm_fp32

x, weight = torch.randn(4, 6, 8), torch.randn(8)
upstream = torch.randn(4, 6, 8)


def norm(x, weight):
    return rms_norm_fp32(x, weight, 1e-5, weight_multiply={weight_multiply!r})


used = norm
if {is_compiled}:
    used = torch.compile(norm, backend="aot_eager", fullgraph=True)
dtypes = (torch.bfloat16,) if {is_compiled} else (torch.float32, torch.bfloat16)
places = (Shard(1), Shard(2)) if {is_compiled} else (Replicate(), Shard(0), Shard(1), Shard(2))
for dtype in dtypes:
    plain = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, weight)]
    expected = norm(*plain)
    expected.backward(upstream.to(dtype))
    for place in places:
        torch._dynamo.reset()
        spread = distribute_tensor(x.to(dtype), mesh, [place]).requires_grad_()
        scale = distribute_tensor(weight.to(dtype), mesh, [Replicate()]).requires_grad_()
        with torch.no_grad():
            without = used(spread, scale).full_tensor()
        found = used(spread, scale)
        found.backward(distribute_tensor(upstream.to(dtype), mesh, [place]))
        exactly = place != Shard(2)
        whole = found.full_tensor()
        assert torch.equal(whole, without), place
        if exactly:
            assert torch.equal(whole, expected), place
            assert found.placements == (place,), place
        torch.testing.assert_close(whole, expected)
        # In bfloat16 the parts of a gradient are rounded before they are added up.
        tolerance = dict(rtol=0.05, atol=0.05) if dtype == torch.bfloat16 else {{}}
        torch.testing.assert_close(spread.grad.full_tensor(), plain[0].grad, **tolerance)
        torch.testing.assert_close(scale.grad.full_tensor(), plain[1].grad, **tolerance)
    alone = distribute_tensor(x.to(dtype), mesh, [Shard(1)])
    assert torch.equal(used(alone, None).full_tensor(), norm(x.to(dtype), None))
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("weight_multiply", ["fp32", "input"])
def test_shards_of_any_dimension_give_what_the_whole_gives(
    on_two_ranks, weight_multiply, is_compiled
):
    on_two_ranks(SOURCE.format(weight_multiply=weight_multiply, is_compiled=is_compiled))
