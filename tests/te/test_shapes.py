import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from automodel_fn import current_step, step_context
from automodel_fn.te._forward import with_shape_rule
from automodel_fn.te._patch import patch_classes

OPTIONS = {
    "linear": ("bias", "return_bias"),
    "grouped_linear": ("bias", "return_bias"),
    "layer_norm_linear": ("bias", "return_bias", "return_layernorm_output"),
    "layer_norm_mlp": ("bias", "return_bias", "return_layernorm_output"),
    "rms_norm": (),
    "layer_norm": (),
}
COMBINATIONS = [
    pytest.param(field, dict(zip(names, values, strict=True)), id=f"{field} {values}")
    for field, names in OPTIONS.items()
    for values in itertools.product((False, True), repeat=len(names))
]
LAYER_NORM_OUTPUT = {"return_layernorm_output": True}
fields = pytest.mark.parametrize("field", OPTIONS)


def described(outputs):
    """Everything that shape inference can tell of outputs, with their structure."""
    if isinstance(outputs, tuple | list):
        return type(outputs)(described(item) for item in outputs)
    if outputs is None:
        return None
    return tuple(outputs.shape), outputs.dtype, outputs.requires_grad


def tensors(outputs):
    if isinstance(outputs, tuple | list):
        return [tensor for item in outputs for tensor in tensors(item)]
    return [] if outputs is None else [outputs]


@pytest.fixture
def autocast():
    """Autocast of a GPU, entered without one: `torch.autocast` would refuse."""

    def enter(dtype):
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)

    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    yield enter
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


@pytest.fixture
def inferred(patched, called, example):
    """What a patched module says of an input without values, of each kind."""

    def infer(module, field, **properties):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = mode.from_tensor(example(field, **properties))
            yield called(module, field, fake)
        yield called(module, field, fake)
        yield called(module, field, example(field, "meta", **properties))

    return infer


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("field", "options"), COMBINATIONS)
def test_outputs_without_values_are_described_as_the_real_ones(
    patched, made, called, example, inferred, field, options, requires_grad
):
    module = made(patched, field, **options)
    real = described(called(module, field, example(field, requires_grad=requires_grad)))
    for outputs in inferred(module, field, requires_grad=requires_grad):
        assert described(outputs) == real
        assert all(x.is_meta or isinstance(x, FakeTensor) for x in tensors(outputs))


@pytest.mark.parametrize(("field", "options"), COMBINATIONS)
def test_a_frozen_module_and_input_give_outputs_that_need_no_gradient(
    patched, made, called, example, inferred, field, options
):
    module = made(patched, field, **options).requires_grad_(False)
    real = described(called(module, field, example(field)))
    for outputs in inferred(module, field):
        assert described(outputs) == real
        assert not any(tensor.requires_grad for tensor in tensors(outputs))


@pytest.mark.parametrize(("field", "options"), COMBINATIONS)
def test_without_gradients_outputs_are_described_as_the_real_ones(
    patched, made, called, example, inferred, field, options
):
    module = made(patched, field, **options)
    with torch.no_grad():
        real = described(called(module, field, example(field)))
        for outputs in inferred(module, field):
            assert described(outputs) == real


@pytest.mark.parametrize(("field", "options"), COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_have_the_dtype_of_autocast(
    patched, made, called, example, inferred, autocast, field, options, dtype
):
    module = made(patched, field, **options)
    autocast(dtype)
    real = described(called(module, field, example(field)))
    for outputs in inferred(module, field):
        assert described(outputs) == real
        assert {tensor.dtype for tensor in tensors(outputs)} == {dtype}


@pytest.mark.parametrize(("field", "options"), COMBINATIONS)
def test_a_module_in_another_dtype_returns_that(patched, made, called, example, field, options):
    module = made(patched, field, **options).to(torch.bfloat16)
    inp = example(field, dtype=torch.bfloat16)
    real = described(called(module, field, inp))
    assert described(called(module, field, inp.to("meta"))) == real


@pytest.mark.parametrize("field", ["rms_norm", "layer_norm"])
def test_a_norm_returns_the_dtype_of_its_weight(patched, made, called, example, field):
    module = made(patched, field)
    for dtype in (torch.bfloat16, torch.float32):
        inp = example(field, dtype=dtype)
        assert called(module, field, inp).dtype == torch.float32
        assert called(module, field, inp.to("meta")).dtype == torch.float32


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 1, 3, 4)])
@pytest.mark.parametrize("field", ["linear", "layer_norm_linear", "layer_norm_mlp", "rms_norm"])
def test_any_number_of_leading_dimensions_is_right(patched, made, field, shape):
    options = LAYER_NORM_OUTPUT if field.startswith("layer_norm_") else {}
    module = made(patched, field, **options)
    assert described(module(torch.ones(shape, device="meta"))) == described(
        module(torch.ones(shape))
    )


# Tensor and sequence parallelism: what Transformer Engine's source says, as there is no group here.


def parallel(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("mode", "sequence_parallel", "rows"),
    [
        ("column", True, 8),
        ("row", True, 2),
        ("column", False, 4),
        ("row", False, 4),
        (None, True, 4),
    ],
)
def test_sequence_parallel_linears_gather_or_scatter_the_first_dimension(
    patched, made, mode, sequence_parallel, rows
):
    linear = made(patched, "linear")
    parallel(linear, parallel_mode=mode, sequence_parallel=sequence_parallel, tp_size=2)
    assert linear(torch.ones(4, 3, 4, device="meta")).shape == (rows, 3, 6)


@pytest.mark.parametrize("is_gathered", [False, True])
@pytest.mark.parametrize(("mode", "times"), [("column", 2), (None, 1)])
def test_the_norm_output_of_a_sequence_parallel_linear_is_gathered_where_it_says_so(
    patched, made, mode, times, is_gathered
):
    module = parallel(
        made(patched, "layer_norm_linear", return_bias=True, return_layernorm_output=True),
        parallel_mode=mode,
        sequence_parallel=True,
        tp_size=2,
        return_layernorm_output_gathered=is_gathered,
    )
    out, bias, normed = module(torch.ones(3, 2, 4, device="meta"))
    assert (out.shape, bias.shape) == ((3 * times, 2, 6), (6,))
    assert normed.shape == ((3 * times if is_gathered else 3), 2, 4)


@pytest.mark.parametrize("is_gathered", [False, True])
@pytest.mark.parametrize(("set_parallel_mode", "times"), [(True, 2), (False, 1)])
def test_the_norm_output_of_a_sequence_parallel_mlp_is_gathered_where_it_says_so(
    patched, made, set_parallel_mode, times, is_gathered
):
    module = parallel(
        made(patched, "layer_norm_mlp", return_layernorm_output=True),
        set_parallel_mode=set_parallel_mode,
        sequence_parallel=True,
        tp_size=2,
        return_layernorm_output_gathered=is_gathered,
    )
    out, normed = module(torch.ones(3, 2, 4, device="meta"))
    assert out.shape == (3, 2, 4)
    assert normed.shape == ((3 * times if is_gathered else 3), 2, 4)


def test_grouped_linears_leave_the_communication_to_others(patched, made, called, example):
    grouped = parallel(
        made(patched, "grouped_linear"), parallel_mode="column", sequence_parallel=True, tp_size=2
    )
    assert called(grouped, "grouped_linear", example("grouped_linear", "meta")).shape == (5, 6)


def test_a_single_grouped_bias_is_returned_as_it_is(patched, made, called, example):
    grouped = made(patched, "grouped_linear", return_bias=True)
    del grouped.bias0, grouped.bias1
    grouped.bias = torch.nn.Parameter(torch.ones(2, 6))
    _, bias = called(grouped, "grouped_linear", example("grouped_linear", "meta"))
    assert described(bias) == ((2, 6), torch.float32, True)


def test_split_biases_are_returned_joined(patched, made, example):
    linear = made(patched, "linear", return_bias=True)
    linear.query_bias, linear.key_bias = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    del linear.bias
    assert linear(example("linear", "meta"))[1].shape == (6,)


# Edges.


@fields
def test_a_backward_through_a_meta_output_reaches_the_input(patched, made, called, example, field):
    module = made(patched, field).to("meta")
    inp = example(field, "meta", requires_grad=True)
    out = called(module, field, inp)
    out.sum().backward()
    assert inp.grad.is_meta
    assert inp.grad.shape == inp.shape
    for parameter in module.parameters():
        assert parameter.grad.is_meta
        assert (parameter.grad.shape, parameter.grad.dtype) == (parameter.shape, parameter.dtype)


@fields
def test_real_parameters_get_no_gradient_from_values_that_do_not_exist(
    patched, made, called, example, field
):
    module = made(patched, field)
    inp = example(field, "meta", requires_grad=True)
    called(module, field, inp).sum().backward()
    assert inp.grad.is_meta
    assert [parameter.grad for parameter in module.parameters()] == [None] * len(
        list(module.parameters())
    )


@fields
def test_a_backward_through_a_fake_output_gives_fake_gradients(
    patched, made, called, example, field
):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        module = made(patched, field)
        inp = mode.from_tensor(example(field, requires_grad=True))
        called(module, field, inp).sum().backward()
        assert isinstance(inp.grad, FakeTensor)
        assert all(isinstance(p.grad, FakeTensor) for p in module.parameters())


@pytest.mark.parametrize("field", ["linear", "grouped_linear", "layer_norm_linear"])
def test_a_returned_bias_depends_on_the_bias_alone(patched, made, called, example, field):
    module = made(patched, field, return_bias=True)
    biases = [p for name, p in module.named_parameters() if name.startswith("bias")]
    others = [p for name, p in module.named_parameters() if not name.startswith("bias")]
    for is_bias_trained in (True, False):
        for bias in biases:
            bias.requires_grad_(is_bias_trained)
        for other in others:
            other.requires_grad_(not is_bias_trained)
        for device in ("cpu", "meta"):
            out, returned = called(module, field, example(field, device))
            assert out.requires_grad is not is_bias_trained
            assert {tensor.requires_grad for tensor in tensors(returned)} == {is_bias_trained}


@fields
def test_a_meta_output_can_be_computed_with(patched, made, called, example, field):
    out = called(made(patched, field), field, example(field, "meta"))
    assert (out * 2 + 1).mean().shape == ()


@fields
def test_the_values_of_a_real_input_are_computed(classes, made, called, example, field):
    module = made(classes, field)
    plain = called(module, field, example(field))
    with patch_classes(classes, current_step):
        assert torch.equal(called(module, field, example(field)), plain)


def test_what_was_freed_is_not_taken_for_shape_inference():
    # Its values are gone; an answer with memory and without values would hide that.
    inp = torch.ones(2)
    inp.untyped_storage().resize_(0)
    shaped = with_shape_rule(lambda self, inp: "ran", lambda module, inp: "inferred")
    assert shaped(None, inp) == "ran"
    assert shaped(None, torch.ones(2, device="meta")) == "inferred"


@fields
def test_shape_inference_quantizes_nothing_and_keeps_nothing(patched, made, called, example, field):
    module = made(patched, field)
    with step_context(first_microbatch=True):
        called(module, field, example(field, "meta"))
    assert getattr(module, "num_quantizations", 0) == 0
    assert not getattr(module, "_kept", {})


# Dynamo makes an instance of each autograd function that it traces, and is told off for it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("requires_grad", [False, True])
@fields
def test_compiled_shape_inference_is_the_same(
    patched, made, called, example, field, compiled_forward, requires_grad
):
    module = made(patched, field).requires_grad_(requires_grad)
    inp = example(field, "meta", requires_grad=requires_grad)
    compiled = compiled_forward(lambda x: called(module, field, x), backend="eager")
    assert described(compiled(inp)) == described(called(module, field, inp))


@pytest.mark.parametrize("field", ["linear", "grouped_linear", "layer_norm_mlp", "rms_norm"])
def test_an_empty_batch_has_an_empty_output(patched, made, field):
    inputs = (torch.zeros(2, dtype=torch.int64),) if field == "grouped_linear" else ()
    out = made(patched, field)(torch.ones(0, 4, device="meta"), *inputs)
    assert out.shape == (0, 4 if field in ("layer_norm_mlp", "rms_norm") else 6)


def test_a_pipeline_stage_of_patched_modules_runs(patched, made, tmp_path):
    # torch 2.11 infers the shapes of a stage on meta, 2.13 on tensors of its device.
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(made(patched, "rms_norm"), made(patched, "linear"))
        stage = PipelineStage(model, 0, 1, torch.device("cpu"))
        schedule = ScheduleGPipe(stage, 2, loss_fn=lambda out, target: (out - target).sum())
        out = schedule.step(torch.ones(4, 4), target=torch.ones(4, 6))
    finally:
        torch.distributed.destroy_process_group()
    assert out.shape == (4, 6)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_composite_modules_infer_shapes_through_their_parts(patched, made, called, example):
    for field in ("multihead_attention", "transformer_layer"):
        module = made(patched, field)
        inp = example(field, "meta", requires_grad=True)
        out = called(module, field, inp)
        assert described(out) == (tuple(inp.shape), inp.dtype, True)
        out.sum().backward()
        assert inp.grad.is_meta


@fields
def test_an_input_given_by_its_name_is_answered_too(patched, made, example, field):
    module = made(patched, field)
    name = "input" if "norm" in field.split("_")[-1] else "inp"
    more = {"m_splits": torch.tensor([2, 3])} if field == "grouped_linear" else {}

    found = module(**{name: example(field, "meta")}, **more)

    assert described(found) == described(module(**{name: example(field)}, **more))
    assert found.is_meta
