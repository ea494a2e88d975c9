import pytest
import torch
from torch import nn

import automodel_fn
from automodel_fn import BackendUnavailableError, ConfigError, build, step_context

backends = pytest.mark.parametrize("backend", ["torch", "te"])
biases = pytest.mark.parametrize("bias", [True, False])
pytestmark = pytest.mark.usefixtures("classes")


def test_the_builders_are_reached_through_the_package():
    assert automodel_fn.build is build
    assert build.linear.__module__ == "automodel_fn.build._linear"


def test_torch_builds_an_ordinary_linear_layer():
    assert type(build.linear(4, 6)) is nn.Linear


def test_te_builds_transformer_engines_linear(classes):
    layer = build.linear(4, 6, backend="te")
    assert isinstance(layer, classes.linear)
    assert type(layer) is type(build.linear(4, 6, backend="te"))


@backends
@biases
def test_a_layer_has_the_sizes_and_the_bias_that_were_asked_for(backend, bias):
    layer = build.linear(4, 6, bias=bias, backend=backend, dtype="fp32")
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == (
        {"weight": (6, 4), "bias": (6,)} if bias else {"weight": (6, 4)}
    )
    assert layer(torch.ones(2, 3, 4)).shape == (2, 3, 6)


@backends
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.bfloat16),
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        ("torch.float16", torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_parameters_have_the_dtype_that_was_asked_for(backend, dtype, expected):
    given = {} if dtype is None else {"dtype": dtype}
    layer = build.linear(4, 6, bias=True, backend=backend, **given)
    assert {parameter.dtype for parameter in layer.parameters()} == {expected}


@backends
def test_no_device_is_pytorchs_default_one(backend):
    assert build.linear(4, 6, backend=backend).weight.device.type == "cpu"
    with torch.device("meta"):
        assert build.linear(4, 6, backend=backend).weight.is_meta
        assert build.linear(4, 6, backend=backend, device="cpu").weight.device.type == "cpu"


@backends
@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_a_device_is_a_name_or_a_device(backend, device):
    assert build.linear(4, 6, backend=backend, device=device).weight.is_meta


def test_transformer_engine_is_given_the_device_as_a_string(classes, monkeypatch):
    given = []
    original = classes.linear.__init__

    def told(self, *args, **kwargs):
        given.append(kwargs["device"])
        original(self, *args, **kwargs)

    monkeypatch.setattr(classes.linear, "__init__", told)
    build.linear(4, 6, backend="te", device=torch.device("meta"))
    build.linear(4, 6, backend="te", device="meta")
    build.linear(4, 6, backend="te")
    assert given == ["meta", "meta", "cpu"]


@backends
@biases
def test_a_layer_from_meta_is_the_one_that_is_made_at_once(filled, backend, bias):
    late = filled(build.linear(4, 6, bias=bias, backend=backend, device="meta"), seed=7)
    torch.manual_seed(7)
    at_once = build.linear(4, 6, bias=bias, backend=backend)
    assert late.state_dict().keys() == at_once.state_dict().keys()
    for name, tensor in at_once.state_dict().items():
        found = late.state_dict()[name]
        assert found.dtype == tensor.dtype
        assert torch.equal(found.view(torch.int16), tensor.view(torch.int16))


@backends
def test_a_layer_trains(backend):
    layer = build.linear(4, 6, bias=True, backend=backend, dtype="fp32")
    layer(torch.ones(2, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_a_te_layer_sees_the_step_and_leaves_its_class_alone(classes):
    before = list(vars(classes.linear).items())
    layer = build.linear(4, 6, backend="te", dtype="fp32")
    for first in (True, False, False):
        with step_context(first_microbatch=first):
            layer(torch.ones(1, 4))
    assert layer.num_quantizations == 1
    assert list(vars(classes.linear).items()) == before


def test_a_te_layer_infers_shapes_without_memory():
    layer = build.linear(4, 6, backend="te")
    out = layer(torch.ones(2, 4, device="meta", dtype=torch.bfloat16, requires_grad=True))
    assert (out.shape, out.dtype, out.is_meta) == ((2, 6), torch.bfloat16, True)
    assert out.grad_fn is not None


# Errors.


@pytest.mark.parametrize(
    ("given", "near"), [("tee", "te"), ("Torch", "torch"), ("pytorch", "torch")]
)
def test_an_unknown_backend_is_an_error_that_names_the_nearest(given, near):
    with pytest.raises(
        ConfigError, match=rf"backend='{given}' .*'torch', 'te'; did you mean '{near}'"
    ):
        build.linear(4, 6, backend=given)


@pytest.mark.parametrize("given", ["quack", "", "auto", None, 3])
def test_an_unknown_backend_without_a_near_one_is_an_error_too(given):
    with pytest.raises(ConfigError, match=r"must be one of 'torch', 'te'$"):
        build.linear(4, 6, backend=given)


@pytest.mark.parametrize("size", [0, -1, 1.5, "4", None, True])
@pytest.mark.parametrize("name", ["in_features", "out_features"])
@backends
def test_a_size_that_is_no_positive_int_is_an_error(backend, name, size):
    sizes = {"in_features": 4, "out_features": 6, name: size}
    with pytest.raises(ConfigError, match=rf"{name}={size!r} must be a positive int"):
        build.linear(**sizes, backend=backend)


@pytest.mark.parametrize("dtype", ["bf17", torch.int8, torch.complex64, "int64", None, 16])
@backends
def test_a_dtype_that_parameters_cannot_have_is_an_error(backend, dtype):
    with pytest.raises(ConfigError, match="dtype="):
        build.linear(4, 6, backend=backend, dtype=dtype)


def test_all_that_is_wrong_is_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        build.linear(0, -1, backend="tee", dtype="bf17")
    head, *lines = str(caught.value).splitlines()
    assert head == "a linear layer cannot be built:"
    assert [line.split("=")[0].strip() for line in lines] == [
        "backend",
        "in_features",
        "out_features",
        "dtype",
    ]


def test_te_where_it_cannot_be_imported_is_an_error_that_says_so(no_transformer_engine):
    with pytest.raises(BackendUnavailableError, match="Transformer Engine"):
        build.linear(4, 6, backend="te")
    assert type(build.linear(4, 6)) is nn.Linear


def test_wrong_arguments_are_told_before_anything_is_imported(no_transformer_engine):
    with pytest.raises(ConfigError, match="in_features"):
        build.linear(0, 6, backend="te")
