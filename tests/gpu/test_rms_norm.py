import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from automodel_fn import ConfigError, Float32RMSNorm, rms_norm_fp32, rms_norm_kernel
from automodel_fn.ops._launch import Relaunch, kernel_launch
from automodel_fn.ops._rms_norm import rms_norm_reference
from automodel_fn.testing import check_rms_norm, check_rms_norm_residual, check_rms_norm_scale

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # Inductor imports parts of torch that warn.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Small, odd, many rows, one element, held in registers at most, and read in chunks.
SHAPES = ((64, 512), (3, 1000), (2, 33, 129), (4000, 128), (1, 1), (5, 16384), (37, 17001))
# A gradient is off by its rounding, and by what sums over rows lose.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}
ULP = {torch.bfloat16: 2**-7, torch.float16: 2**-10}

both_ways = pytest.mark.parametrize("weight_multiply", ["fp32", "input"])
by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_shape = pytest.mark.parametrize("shape", SHAPES)


def made(shape, dtype, weight_dtype=None):
    x = (torch.randn(shape, device="cuda") * 3).to(dtype)
    return x, torch.randn(shape[-1:], device="cuda").to(weight_dtype or dtype)


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


def assert_gradients_are_near(found, exact):
    for left, right in zip(found, exact, strict=True):
        error = (left.double() - right).abs().max() / right.abs().max()
        assert error <= TOLERANCE[left.dtype], error


def exact_gradients(x, weight, dy):
    wide = leaves(x.double(), weight.double())
    return torch.autograd.grad(rms_norm_reference(*wide, 1e-5), wide, dy.double())


@both_ways
@by_dtype
@by_shape
def test_the_law_of_the_norm_holds(shape, dtype, weight_multiply):
    x, weight = made(shape, dtype)
    assert rms_norm_kernel(x, weight).name == "triton"
    check_rms_norm(x, weight, 1e-5, weight_multiply=weight_multiply)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@by_shape
def test_a_rounded_element_is_off_by_a_unit_in_the_last_place_at_most(shape, dtype):
    x, weight = made(shape, dtype, torch.float32)
    exact = rms_norm_reference(x, weight, 1e-5)
    error = (rms_norm_fp32(x, weight, 1e-5).double() - exact).abs()
    least = torch.finfo(dtype).smallest_normal
    assert (error <= ULP[dtype] * exact.abs().clamp_min(least)).all()


@both_ways
@by_dtype
@pytest.mark.parametrize("shape", [(64, 512), (3, 1000), (300, 7), (37, 17001), (0, 8), (2, 0, 8)])
def test_a_residual_gives_the_bits_of_adding_first(shape, dtype, weight_multiply):
    x, weight = made(shape, dtype)
    residual = torch.randn(shape, device="cuda").to(dtype)
    check_rms_norm_residual(x, residual, weight, 1e-5, weight_multiply=weight_multiply)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("exponent", [-7, 6])
@by_dtype
def test_powers_of_two_change_no_bit(dtype, exponent, eps):
    x, _ = made((33, 129), dtype)
    # None so small that a power of two makes it subnormal, which takes bits from it.
    x = x.abs().clamp(2**-6, 8).copysign(x)
    check_rms_norm_scale(x, eps, exponent)


# Of one element, the exact gradient of x is what eps leaves of it: nearly nothing.
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != (1, 1)])
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float32, torch.float32),
    ],
)
def test_gradients_are_those_of_float64(shape, dtype, stored):
    x, weight = made(shape, dtype, stored)
    dy = torch.randn(shape, device="cuda").to(dtype)
    found_leaves = leaves(x, weight)
    y = rms_norm_fp32(*found_leaves, 1e-5)

    found = torch.autograd.grad(y, found_leaves, dy, retain_graph=True)
    again = torch.autograd.grad(y, found_leaves, dy)

    assert_gradients_are_near(found, exact_gradients(x, weight, dy))
    assert all(torch.equal(left, right) for left, right in zip(found, again, strict=True))


@by_dtype
@pytest.mark.parametrize("shape", [(300, 64), (37, 17001)])
def test_gradients_with_a_residual_are_those_of_float64(shape, dtype):
    x, weight = made(shape, dtype)
    residual, dy, dsum = torch.randn(3, *shape, device="cuda").to(dtype).unbind()
    used = leaves(x, residual, weight)
    results = rms_norm_fp32(used[0], used[2], 1e-5, residual=used[1])
    found = torch.autograd.grad(results, used, (dy, dsum))

    of_norm, of_weight = exact_gradients(x + residual, weight, dy)
    of_sum = of_norm + dsum.double()
    assert_gradients_are_near(found, (of_sum, of_sum, of_weight))


@by_dtype
def test_strided_rows_are_read_where_they_lie(dtype):
    packed = torch.randn(6, 4, 384, device="cuda").to(dtype)
    weight = torch.randn(128, device="cuda").to(dtype)
    for x in (packed[..., 128:256], packed.transpose(0, 1)[..., :128], packed[..., ::3]):
        assert not x.is_contiguous()
        plain = x.contiguous()
        assert torch.equal(rms_norm_fp32(x, weight, 1e-5), rms_norm_fp32(plain, weight, 1e-5))
        upstream = torch.randn(384, *x.shape[:-1], device="cuda").movedim(0, -1)[..., :128]
        grads = []
        for form in (x, plain):
            used = form.detach().requires_grad_()
            y = rms_norm_fp32(used, weight, 1e-5)
            grads.append(torch.autograd.grad(y, used, upstream.to(dtype))[0])
        assert torch.equal(*grads)


@pytest.mark.parametrize("hidden", [129, 17001])
@pytest.mark.parametrize("kind", ["every second", "one for all"])
def test_a_weight_with_gaps_is_the_weight(kind, hidden):
    x, base = made((5, hidden), torch.bfloat16)
    base = base.repeat_interleave(2)
    given = base[::2] if kind == "every second" else base[:1].expand(hidden)
    assert given.stride() != (1,)
    dy = torch.randn_like(x)
    found, expected = [], []
    for weight, results in ((given, found), (given.contiguous(), expected)):
        used = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
        y = rms_norm_fp32(*used, 1e-5)
        results += [y, *torch.autograd.grad(y, used, dy)]

    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)


def test_a_weight_with_shards_beside_a_plain_input_is_refused_as_torch_refuses_it():
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x, weight = made((4, 64), torch.bfloat16)
        scale = distribute_tensor(weight, init_device_mesh("cuda", (1,)), [Shard(0)])
        with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
            rms_norm_fp32(x, scale, 1e-5)
    finally:
        dist.destroy_process_group()


@both_ways
@pytest.mark.parametrize("with_residual", [False, True])
def test_a_call_again_has_the_bits_of_the_first(with_residual, weight_multiply, monkeypatch):
    launched, relaunch = [], Relaunch.__call__
    monkeypatch.setattr(
        Relaunch, "__call__", lambda *given: launched.append(relaunch(*given)) or launched[-1]
    )
    x, weight = made((61, 640), torch.bfloat16)
    residual = torch.randn_like(x) if with_residual else None
    dy, eps, found = torch.randn_like(x), 1.0 + torch.rand(()).item(), []
    for _ in range(3):
        used = [tensor for tensor in (x, weight, residual) if tensor is not None]
        used = leaves(*used)
        out = rms_norm_fp32(
            *used[:2],
            eps,
            weight_multiply=weight_multiply,
            residual=used[2] if with_residual else None,
        )
        outputs = list(out) if with_residual else [out]
        found.append([*outputs, *torch.autograd.grad(outputs, used, [dy] * len(outputs))])

    # In the second call the forward, in the third the gradients and the sum of their parts too.
    assert launched == [True] * 4
    for again in found[1:]:
        for left, right in zip(again, found[0], strict=True):
            assert torch.equal(left, right)
    with pytest.raises(ConfigError, match="eps=-1"):
        rms_norm_fp32(x, weight, -1.0)
    x[0, 0] = torch.nan
    assert rms_norm_fp32(x, weight, eps, weight_multiply=weight_multiply)[0].isnan().all()


def test_only_what_is_wanted_is_differentiated():
    x, weight = made((64, 512), torch.bfloat16)
    dy = torch.randn_like(x)
    both = leaves(x, weight)
    of_x, of_weight = torch.autograd.grad(rms_norm_fp32(*both, 1e-5), both, dy)

    assert torch.equal(
        torch.autograd.grad(rms_norm_fp32(both[0], weight, 1e-5), both[0], dy)[0], of_x
    )
    (alone,) = torch.autograd.grad(rms_norm_fp32(x, both[1], 1e-5), both[1], dy)
    assert torch.equal(alone, of_weight)


def test_a_second_derivative_is_refused():
    used = leaves(*made((4, 8), torch.float32))
    (first,) = torch.autograd.grad(
        rms_norm_fp32(*used, 1e-5).sin().sum(), used[0], create_graph=True
    )

    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@both_ways
@by_dtype
def test_compiled_the_bits_are_those_of_eager_mode_gradients_too(dtype, weight_multiply):
    torch._dynamo.reset()

    def norm(x, weight, residual):
        return rms_norm_fp32(x, weight, 1e-5, weight_multiply=weight_multiply, residual=residual)

    compiled = torch.compile(norm, fullgraph=True)
    x, weight = made((33, 129), dtype)
    with torch.no_grad():
        for left, right in zip(compiled(x, weight, x), norm(x, weight, x), strict=True):
            assert torch.equal(left, right)
    grads = []
    upstream = torch.randn(2, 33, 129, device="cuda").to(dtype).unbind()
    for used in (norm, compiled):
        tensors = leaves(x, weight, x)
        grads.append(torch.autograd.grad(used(*tensors), tensors, upstream))
    for left, right in zip(*grads, strict=True):
        assert torch.equal(left, right)


def test_fifty_shapes_need_two_graphs_at_most():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    norm = torch.compile(Float32RMSNorm(64, device="cuda"), fullgraph=True)
    for rows in range(2, 52):
        norm(torch.randn(rows, 64, device="cuda").bfloat16()).sum().backward()
    assert counters["stats"]["unique_graphs"] <= 2


def test_it_can_be_captured_in_a_cuda_graph():
    x, weight = made((64, 512), torch.bfloat16)
    rms_norm_fp32(x, weight, 1e-5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = rms_norm_fp32(x, weight, 1e-5)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, rms_norm_fp32(x, weight, 1e-5))


def test_a_kernel_runs_on_the_current_stream():
    x, weight = made((4096, 4096), torch.bfloat16)
    expected = rms_norm_fp32(x, weight, 1e-5)
    stream = torch.cuda.Stream()
    late = torch.empty_like(x)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late.copy_(x)
        y = rms_norm_fp32(late, weight, 1e-5)
    stream.synchronize()
    assert torch.equal(y, expected)


def test_what_torch_func_transforms_is_computed_by_torch():
    x, weight = made((4, 8), torch.float32)
    mapped = torch.func.vmap(lambda row: rms_norm_fp32(row, weight, 1e-5))(x)
    torch.testing.assert_close(mapped, rms_norm_fp32(x, weight, 1e-5))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_dtensors_are_computed_by_the_kernels_too(is_compiled):
    torch._dynamo.reset()
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cuda", (1,))
        x, weight = made((4, 6, 64), torch.bfloat16)
        plain = leaves(x, weight)
        expected = rms_norm_fp32(*plain, 1e-5)
        grads = torch.autograd.grad(expected.sum(), plain)
        used = torch.compile(rms_norm_fp32, fullgraph=True) if is_compiled else rms_norm_fp32
        for place in (Replicate(), Shard(0), Shard(1)):
            spread = distribute_tensor(x, mesh, [place]).requires_grad_()
            scale = distribute_tensor(weight, mesh, [Replicate()]).requires_grad_()
            assert rms_norm_kernel(spread, scale).name == "triton"
            found = used(spread, scale, 1e-5)
            assert torch.equal(found.full_tensor(), expected)
            for left, right in zip(
                torch.autograd.grad(found.sum(), (spread, scale)), grads, strict=True
            ):
                assert torch.equal(left.full_tensor(), right)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_kernel_runs_where_its_tensors_are():
    x, weight = made((64, 512), torch.bfloat16)
    other = [tensor.to("cuda:1") for tensor in (x, weight)]
    assert torch.equal(rms_norm_fp32(*other, 1e-5).cpu(), rms_norm_fp32(x, weight, 1e-5).cpu())


def test_kernels_are_launched_as_this_version_of_triton_allows():
    import triton

    expected = "direct" if triton.__version__ == "3.6.0" else "triton"
    assert kernel_launch().name == expected
