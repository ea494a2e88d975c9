import math

import pytest
import torch
from torch import nn

from automodel_fn import BackendUnavailableError, ConfigError, Float32RMSNorm, build

BACKENDS = ("torch_fp32", "torch", "te")
backends = pytest.mark.parametrize("backend", BACKENDS)
pytestmark = pytest.mark.usefixtures("classes")


def reference(x, weight, eps):
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def test_each_backend_builds_its_own_norm(classes):
    assert type(build.rms_norm(4)) is Float32RMSNorm
    assert type(build.rms_norm(4, backend="torch_fp32")) is Float32RMSNorm
    assert type(build.rms_norm(4, backend="torch")) is nn.RMSNorm
    assert isinstance(build.rms_norm(4, backend="te"), classes.rms_norm)


@backends
@pytest.mark.parametrize("eps", [0, 1e-5, 1e-2, 1])
def test_a_norm_computes_what_its_name_says(backend, eps):
    norm = build.rms_norm(4, eps=eps, backend=backend, dtype="fp32")
    x = torch.linspace(-2, 3, 24).view(2, 3, 4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    torch.testing.assert_close(
        norm(x).double(), reference(x, norm.weight, eps), rtol=1e-5, atol=1e-6
    )
    assert norm.eps == eps


@backends
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, torch.bfloat16), ("fp32", torch.float32), (torch.float16, torch.float16)],
)
def test_the_weight_has_the_dtype_that_was_asked_for(backend, dtype, expected):
    given = {} if dtype is None else {"dtype": dtype}
    norm = build.rms_norm(4, backend=backend, **given)
    assert [(name, p.dtype, p.shape) for name, p in norm.named_parameters()] == [
        ("weight", expected, (4,))
    ]
    assert norm(torch.ones(2, 4, dtype=expected)).dtype == expected


@backends
def test_no_device_is_pytorchs_default_one(backend):
    assert build.rms_norm(4, backend=backend).weight.device.type == "cpu"
    with torch.device("meta"):
        assert build.rms_norm(4, backend=backend).weight.is_meta
        assert build.rms_norm(4, backend=backend, device="cpu").weight.device.type == "cpu"


@backends
@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_a_norm_from_meta_is_the_one_that_is_made_at_once(filled, backend, device):
    late = filled(build.rms_norm(4, backend=backend, device=device))
    at_once = build.rms_norm(4, backend=backend)
    assert torch.equal(late.weight, torch.ones(4, dtype=torch.bfloat16))
    assert late.state_dict().keys() == at_once.state_dict().keys()
    assert torch.equal(late.weight, at_once.weight)


def test_a_te_norm_infers_shapes_without_memory_and_leaves_its_class_alone(classes):
    norm = build.rms_norm(4, backend="te")
    out = norm(torch.ones(2, 4, device="meta", requires_grad=True))
    assert (out.shape, out.dtype, out.is_meta) == ((2, 4), torch.bfloat16, True)
    assert "forward" not in vars(classes.rms_norm)


@pytest.mark.parametrize(("given", "near"), [("torch_fp23", "torch_fp32"), ("tee", "te")])
def test_an_unknown_backend_is_an_error_that_names_the_nearest(given, near):
    with pytest.raises(ConfigError, match=rf"backend='{given}' .*did you mean '{near}'"):
        build.rms_norm(4, backend=given)


@backends
@pytest.mark.parametrize("dim", [0, -1, 4.0, "4", None, True, (4,)])
def test_a_dim_that_is_no_positive_int_is_an_error(backend, dim):
    with pytest.raises(ConfigError, match=r"dim=.* must be a positive int"):
        build.rms_norm(dim, backend=backend)


@backends
@pytest.mark.parametrize("eps", [-1e-5, math.inf, math.nan, "1e-5", None, True])
def test_an_eps_that_is_not_finite_and_at_least_0_is_an_error(backend, eps):
    with pytest.raises(ConfigError, match=r"eps=.* must be a finite number of at least 0"):
        build.rms_norm(4, eps=eps, backend=backend)


@backends
@pytest.mark.parametrize("dtype", ["bf17", torch.int8, torch.complex64, None])
def test_a_dtype_that_a_weight_cannot_have_is_an_error(backend, dtype):
    with pytest.raises(ConfigError, match="dtype="):
        build.rms_norm(4, backend=backend, dtype=dtype)


def test_all_that_is_wrong_is_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        build.rms_norm(0, eps=-1, backend="tee", dtype=torch.int8)
    head, *lines = str(caught.value).splitlines()
    assert head == "an RMSNorm cannot be built:"
    assert [line.split("=")[0].strip() for line in lines] == ["backend", "dim", "eps", "dtype"]


def test_te_where_it_cannot_be_imported_is_an_error_that_says_so(no_transformer_engine):
    with pytest.raises(BackendUnavailableError, match="Transformer Engine"):
        build.rms_norm(4, backend="te")
