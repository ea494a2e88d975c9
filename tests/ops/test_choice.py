import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from automodel_fn import KernelChoice, rms_norm_fp32, rms_norm_kernel, swiglu, swiglu_kernel
from automodel_fn.ops import (
    _choice,
    _rms_norm,
    _rms_norm_operators,
    _swiglu,
    _swiglu_operators,
    rope_kernel,
)
from automodel_fn.ops._choice import is_direct, is_plain, is_watched


class Wrapped(torch.Tensor):
    """A tensor on CUDA that has no memory of its own."""

    @staticmethod
    def __new__(cls, *shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bfloat16, device="cuda")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(func)


@pytest.fixture
def on_cuda():
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield lambda *shape, dtype=torch.bfloat16, index=0: torch.empty(
            shape, dtype=dtype, device=f"cuda:{index}"
        )


@pytest.fixture
def with_triton(monkeypatch):
    monkeypatch.setattr(_choice, "has_triton", lambda: True)


def test_on_a_cpu_torch_computes_and_says_why():
    assert rms_norm_kernel(torch.ones(2), None) == KernelChoice("torch", reason="x is on cpu")
    assert swiglu_kernel(torch.ones(2), torch.ones(2)).reason == "gate is on cpu"


@pytest.mark.usefixtures("with_triton")
def test_on_cuda_a_kernel_computes(on_cuda):
    x = on_cuda(2, 8)

    assert rms_norm_kernel(x, on_cuda(8, dtype=torch.float32), x).name == "triton"
    assert rms_norm_kernel(x, None).name == "triton"
    assert swiglu_kernel(x, x).name == "triton"
    assert rope_kernel(x, x).name == "triton"


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        ({"dtype": torch.float64}, "weight is torch.float64"),
        ({"index": 1}, "weight is on cuda:1, not on cuda:0"),
    ],
)
def test_what_no_kernel_takes_is_said(on_cuda, weight, reason):
    assert rms_norm_kernel(on_cuda(2, 8), on_cuda(8, **weight)).reason == reason


@pytest.mark.usefixtures("with_triton")
def test_a_subclass_that_is_not_known_is_left_to_torch():
    x = Wrapped(2, 8)

    assert rms_norm_kernel(x, None).reason == "x is of the type Wrapped"
    assert swiglu_kernel(x, x).reason == "gate is of the type Wrapped"
    assert rope_kernel(x, x).reason == "q is of the type Wrapped"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.usefixtures("with_triton")
def test_what_torch_func_transforms_is_left_to_torch(on_cuda):
    x, seen = on_cuda(2, 8), []

    def noted(row):
        seen.extend([rms_norm_kernel(row, None), swiglu_kernel(row, row)])
        # Of the tables it knows nothing, so any transform at all is enough.
        seen.append(rope_kernel(x, x))
        return row

    torch.func.vmap(noted)(x)

    assert [choice.reason for choice in seen] == [
        "x is in a transform of torch.func",
        "gate is in a transform of torch.func",
        "a transform of torch.func is at work",
    ]


@pytest.mark.usefixtures("with_triton")
def test_of_a_dtensor_the_shard_is_taken_where_it_has_whole_rows():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, local = init_device_mesh("cpu", (1,)), Wrapped(2, 8)
        meta = TensorMeta(local.shape, local.stride(), local.dtype)
        for place in (Replicate(), Shard(0), Shard(1)):
            spec = DTensorSpec(mesh, (place,), tensor_meta=meta)
            x = DTensor(local, spec, requires_grad=False)
            assert swiglu_kernel(x, x).name == rope_kernel(x, x).name == "triton"
            choice = rms_norm_kernel(x, None)
            if place == Shard(1):
                assert choice.reason == "x is sharded over its last dimension"
            else:
                assert choice.name == "triton"
    finally:
        dist.destroy_process_group()


def test_without_triton_torch_computes(on_cuda, monkeypatch):
    monkeypatch.setattr(_choice, "has_triton", lambda: False)

    assert swiglu_kernel(on_cuda(2), on_cuda(2)).reason == "Triton is not installed"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_what_torch_func_maps_is_not_plain():
    seen = []
    torch.func.vmap(lambda row: seen.append(is_plain(row)) or row)(torch.ones(2, 3))

    assert seen == [False]


def test_a_dispatch_mode_watches():
    assert not is_watched()
    with FakeTensorMode():
        assert is_watched()


def test_only_plain_tensors_that_nobody_watches_are_computed_on_directly():
    x = torch.ones(2, 8)

    assert is_direct(x, None, torch.nn.Parameter(x))
    assert not is_direct(x, None, Wrapped(2, 8))
    with FakeTensorMode():
        assert not is_direct(x)


@pytest.fixture
def ways(monkeypatch):
    """The ways that are taken where every tensor says that it is on CUDA."""
    taken = []

    def noted(name):
        return lambda *given: taken.append(name)

    monkeypatch.setattr(_rms_norm, "eager_triton", noted("kernel"))
    # It would look into the kernels, which are not here.
    monkeypatch.setattr(_rms_norm, "eager_triton_again", lambda *given: None)
    monkeypatch.setattr(_swiglu, "_eager", noted("kernel"))
    monkeypatch.setattr(_rms_norm, "_by_operator", noted("operator"))
    monkeypatch.setattr(_swiglu, "multiplied", noted("operator"))
    monkeypatch.setattr(_rms_norm, "_by_operators", noted("operators of torch"))
    monkeypatch.setattr(_swiglu, "_by_operators", noted("operators of torch"))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda:0"), raising=False)
    return taken


def test_a_norm_asks_first_whether_it_was_called_so_before(ways, monkeypatch):
    asked, x = [], torch.ones(2, 8)
    monkeypatch.setattr(_rms_norm, "eager_triton_again", lambda *given: asked.append(given) or "y")

    weight, residual = torch.ones(8), torch.ones(2, 8)
    found = rms_norm_fp32(x, weight, 1e-5, weight_multiply="input", residual=residual)

    assert found == "y"
    assert [id(each) for each in asked[0][:3]] == [id(x), id(weight), id(residual)]
    assert asked[0][3:] == (1e-5, "input")
    assert not ways


@pytest.mark.usefixtures("with_triton")
def test_kernels_are_launched_on_plain_tensors_only(ways, monkeypatch):
    monkeypatch.setattr(_choice, "_STAND_FOR_PLAIN", (Wrapped,))
    x, wrapped = torch.ones(2, 8).bfloat16(), Wrapped(2, 8)
    for residual in (None, x):
        rms_norm_fp32(x, x[0], 1e-5, residual=residual)
    swiglu(x, x)
    assert ways == ["kernel"] * 3
    ways.clear()
    # A weight or another argument with shards beside a plain one, too: it has no memory.
    rms_norm_fp32(wrapped, x[0], 1e-5)
    rms_norm_fp32(x, Wrapped(8), 1e-5)
    rms_norm_fp32(x, x[0], 1e-5, residual=wrapped)
    swiglu(wrapped, x)
    swiglu(x, wrapped)
    assert ways == ["operator"] * 5
    ways.clear()
    rms_norm_fp32(x.double(), None, 1e-5)
    swiglu(x.double(), x.double())
    assert ways == ["operators of torch"] * 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("operators", [_rms_norm_operators, _swiglu_operators])
def test_what_compilers_trace_a_backward_with_stands_for_plain_tensors(operators, monkeypatch):
    kinds, choice = set(), operators.kernel_choice

    def noted(**tensors):
        kinds.update(type(tensor) for tensor in tensors.values() if tensor is not None)
        return choice(**tensors)

    monkeypatch.setattr(operators, "kernel_choice", noted)
    x = torch.randn(4, 8, requires_grad=True)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def computed(x):
        return rms_norm_fp32(swiglu(x, x), None, 1e-5)

    computed(x).sum().backward()

    assert FunctionalTensor in kinds
    assert all(
        kind in _choice.PLAIN or issubclass(kind, _choice._STAND_FOR_PLAIN) for kind in kinds
    )
