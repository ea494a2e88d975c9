import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from automodel_fn import apply_rope

OPERATOR = "automodel_fn.apply_rope"
D = 8


def made(batch, length, heads):
    q = torch.randn(batch, length, heads, D).transpose(1, 2).requires_grad_()
    k = torch.randn(batch, length, 2, D).transpose(1, 2).requires_grad_()
    return q, k


def rope(q, k, cos, sin, position_ids):
    return apply_rope(q, k, cos, sin, position_ids=position_ids, layout="bhsd")


@pytest.fixture
def tables():
    angles = torch.randn(200, D // 2)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("kind", ["from the first on", "offset", "of every token"])
def test_fifty_shapes_need_two_graphs(graphs, tables, kind):
    compiled = torch.compile(rope, backend=graphs, fullgraph=True)
    for step in range(50):
        batch, length = 2 + step % 3, 2 + step
        q, k = made(batch, length, 2 + step % 5)
        ids = {"from the first on": 0, "offset": 2 + step}.get(kind)
        ids = torch.randint(0, 200, (batch, length)) if ids is None else ids
        found, expected = compiled(q, k, *tables, ids), rope(q, k, *tables, ids)

        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert len(graphs.graphs) <= 2
    assert all(any(OPERATOR in target for target in targets) for targets in graphs.targets)


def test_the_operator_stays_opaque_below_autograd_and_its_gradient_is_one_too(tables):
    seen = []

    def keep(graph, example_inputs):
        seen.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    torch._dynamo.reset()
    from torch._functorch.aot_autograd import make_boxed_compiler

    compiled = torch.compile(
        rope, backend=aot_autograd(fw_compiler=make_boxed_compiler(keep)), fullgraph=True
    )
    q, k = made(2, 5, 4)
    found, expected = compiled(q, k, *tables, 3), rope(q, k, *tables, 3)
    upstream = [torch.randn_like(x) for x in expected]
    gradients = [torch.autograd.grad(both, (q, k), upstream) for both in (found, expected)]

    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))
    assert [sum(OPERATOR in target for target in targets) for targets in seen] == [1, 1]
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_needs_no_operator_of_this_package(strict, tables):
    class Rope(torch.nn.Module):
        def forward(self, q, k, cos, sin):
            return apply_rope(q, k, cos, sin, position_ids=1, layout="bhsd")

    inputs = (*(x.detach() for x in made(2, 5, 4)), *tables)
    program = torch.export.export(Rope(), inputs, strict=strict)

    assert not any("automodel_fn" in str(node.target) for node in program.graph.nodes)
    found, expected = program.module()(*inputs), Rope()(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
