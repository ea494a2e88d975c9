import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor

from automodel_fn import KernelChoice, rms_norm_fp32, rms_norm_kernel, swiglu, swiglu_kernel
from automodel_fn.ops import _choice, _rms_norm_operators, _swiglu_operators
from automodel_fn.ops._choice import is_plain, is_watched


@pytest.fixture
def on_cuda():
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield lambda *shape, dtype=torch.bfloat16, index=0: torch.empty(
            shape, dtype=dtype, device=f"cuda:{index}"
        )


@pytest.fixture
def with_triton(monkeypatch):
    monkeypatch.setattr(_choice, "_has_triton", lambda: True)


def test_on_a_cpu_torch_computes_and_says_why():
    assert rms_norm_kernel(torch.ones(2), None) == KernelChoice("torch", reason="x is on cpu")
    assert swiglu_kernel(torch.ones(2), torch.ones(2)).reason == "gate is on cpu"


@pytest.mark.usefixtures("with_triton")
def test_on_cuda_a_kernel_computes(on_cuda):
    x = on_cuda(2, 8)

    assert rms_norm_kernel(x, on_cuda(8, dtype=torch.float32), x).name == "triton"
    assert swiglu_kernel(x, x).name == "triton"


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


def test_without_triton_torch_computes(on_cuda, monkeypatch):
    monkeypatch.setattr(_choice, "_has_triton", lambda: False)

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
        kind in _choice._PLAIN or issubclass(kind, _choice._STAND_FOR_PLAIN) for kind in kinds
    )
