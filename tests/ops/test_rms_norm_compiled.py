import pytest
import torch

from automodel_fn import Float32RMSNorm, rms_norm_fp32

OPERATOR = "automodel_fn.rms_norm_fp32"

both_ways = pytest.mark.parametrize("weight_multiply", ["fp32", "input"])


@both_ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_with_and_without_gradients_it_is_one_opaque_operator(
    graphs, weight_multiply, dtype
):
    norm = torch.compile(
        lambda x, weight: rms_norm_fp32(x, weight, 1e-5, weight_multiply=weight_multiply),
        backend=graphs,
        fullgraph=True,
    )
    x, weight = torch.randn(3, 33).to(dtype), torch.randn(33).to(dtype)
    expected = rms_norm_fp32(x, weight, 1e-5, weight_multiply=weight_multiply)
    with torch.no_grad():
        without = norm(x, weight)
    found = norm(x.requires_grad_(), weight.requires_grad_())

    assert torch.equal(without, expected)
    assert torch.equal(found, expected)
    assert len(graphs.targets) == 2
    for targets in graphs.targets:
        assert any(OPERATOR in target for target in targets)
        assert not any("rsqrt" in target or "rms_norm.default" in target for target in targets)


@both_ways
def test_the_operator_stays_opaque_below_autograd(weight_multiply):
    seen = []

    def keep(graph, example_inputs):
        seen.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_compiler

    norm = torch.compile(
        lambda x, weight: rms_norm_fp32(x, weight, 1e-5, weight_multiply=weight_multiply),
        backend=aot_autograd(fw_compiler=make_boxed_compiler(keep)),
        fullgraph=True,
    )
    x, weight = torch.randn(3, 33), torch.randn(33)
    with torch.no_grad():
        norm(x, weight)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    norm(*leaves).sum().backward()

    forwards = [targets for targets in seen if any(OPERATOR in target for target in targets)]
    assert len(forwards) == 2
    plain = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    rms_norm_fp32(*plain, 1e-5, weight_multiply=weight_multiply).sum().backward()
    for leaf, other in zip(leaves, plain, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad)
    torch._dynamo.reset()


def test_sizes_and_eps_may_change_without_an_error(graphs):
    norm = torch.compile(
        lambda x, eps: rms_norm_fp32(x, None, eps), backend=graphs, fullgraph=True, dynamic=True
    )
    for rows, eps in ((3, 1e-5), (5, 1e-6), (7, 1e-4)):
        x = torch.randn(rows, 4)
        assert torch.equal(norm(x, eps), rms_norm_fp32(x, None, eps))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_needs_no_operator_of_this_package(strict):
    program = torch.export.export(Float32RMSNorm(4), (torch.randn(2, 4),), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}

    assert not any("automodel_fn" in target for target in targets)
    x = torch.randn(2, 4)
    assert torch.equal(program.module()(x), Float32RMSNorm(4)(x))


def test_compiled_the_gradient_of_the_weight_is_of_what_the_forward_multiplied():
    torch._dynamo.reset()
    x, weight = torch.randn(1, 64).bfloat16(), torch.ones(64, requires_grad=True)
    compiled = torch.compile(rms_norm_fp32, fullgraph=True, backend="aot_eager")

    compiled(x, weight, 1e-5, weight_multiply="input").sum().backward()

    # One row and a gradient of ones show it, bit by bit.
    assert torch.equal(weight.grad, rms_norm_fp32(x, None, 1e-5)[0].float())
