import pytest

SOURCE = """
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from automodel_fn.ops import apply_rope

is_compiled = {is_compiled}
used = apply_rope
if is_compiled:
    used = torch.compile(apply_rope, backend="aot_eager", fullgraph=True)
B, S, N, K, D = 2, 6, 4, 2, 8
cos, sin = torch.randn(20, 4), torch.randn(20, 4)
ids = torch.randint(0, 20, (B, S))
by_token = torch.randn(B, S, 8), torch.randn(1, S, 8).expand(B, S, 8).contiguous()
shared = torch.randn(1, S, 8), torch.randn(1, S, 8)
spread_ids = distribute_tensor(ids, mesh, [Shard(1)])
cases = [
    (cos, sin, dict()),
    (cos, sin, dict(position_ids=3)),
    (cos, sin, dict(position_ids=ids)),
    (cos, sin, dict(position_ids=ids[0])),
    (*by_token, dict()),
    (*shared, dict()),
]
for layout, shape in dict(bshd=(B, S, N, D), bhsd=(B, N, S, D), thd=(S, N, D)).items():
    b, t, n = dict(bshd=(0, 1, 2), bhsd=(0, 2, 1), thd=(None, 0, 1))[layout]
    fewer = [*shape]
    fewer[n] = K
    q, k, of_q, of_k = (torch.randn(size) for size in (shape, fewer, shape, fewer))
    for c, s, options in cases[:2] if is_compiled else cases:
        if layout == "thd":
            c, s = (c[:1], s[:1]) if c.dim() == 3 else (c, s)
            if "position_ids" in options and options["position_ids"] is ids:
                options = dict(position_ids=ids[:1])
        plain = [x.clone().requires_grad_() for x in (q, k)]
        expected = apply_rope(*plain, c, s, layout=layout, **options)
        torch.autograd.backward(expected, [of_q, of_k])
        for place in [Replicate(), Shard(t), Shard(n), *([] if b is None else [Shard(b)])]:
            torch._dynamo.reset()
            leaves = [distribute_tensor(x, mesh, [place]).requires_grad_() for x in (q, k)]
            found = used(*leaves, c, s, layout=layout, **options)
            assert all(x.placements == (place,) for x in found), (layout, place, options)
            upstream = [distribute_tensor(x, mesh, [place]) for x in (of_q, of_k)]
            torch.autograd.backward(found, upstream)
            for x, y in zip(found, expected):
                assert torch.equal(x.full_tensor(), y), (layout, place, options)
            for x, y in zip(leaves, plain):
                assert torch.equal(x.grad.full_tensor(), y.grad), (layout, place, options)
                assert x.grad.placements == (place,), (layout, place, options)
q, k = torch.randn(B, S, N, D), torch.randn(B, S, 1, D)
expected = apply_rope(q, k, cos, sin, position_ids=ids)
spread = distribute_tensor(q, mesh, [Shard(2)]), distribute_tensor(k, mesh, [Replicate()])
found = apply_rope(*spread, cos, sin, position_ids=ids)
assert [x.placements for x in found] == [(Shard(2),), (Replicate(),)]
assert all(torch.equal(x.full_tensor(), y) for x, y in zip(found, expected))
spread = [distribute_tensor(x, mesh, [Shard(1)]) for x in (q, k)]
found = apply_rope(*spread, cos, sin, position_ids=spread_ids)
assert all(x.placements == (Shard(1),) for x in found)
assert all(torch.equal(x.full_tensor(), y) for x, y in zip(found, expected))
uneven = [distribute_tensor(x[:, :5], mesh, [Shard(1)]) for x in (q, k)]
found = apply_rope(*uneven, cos, sin, position_ids=2)
expected = apply_rope(q[:, :5], k[:, :5], cos, sin, position_ids=2)
assert all(torch.equal(x.full_tensor(), y) for x, y in zip(found, expected))
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled", [False, True])
def test_shards_of_examples_tokens_or_heads_give_what_the_whole_gives(on_two_ranks, is_compiled):
    on_two_ranks(SOURCE.format(is_compiled=is_compiled))
