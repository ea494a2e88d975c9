import copy
import functools
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from automodel_fn import (
    BackendUnavailableError,
    TEFp8Config,
    accumulate,
    build,
    patch_te,
    step_context,
)
from automodel_fn.testing import check_patch_reversible

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # Transformer Engine warns of much that is not ours.
    pytest.mark.filterwarnings("ignore"),
]

IN, OUT, HIDDEN, HEADS, ROWS = 64, 96, 128, 2, 32
SIZES = {
    "linear": (IN, OUT),
    "grouped_linear": (2, IN, OUT),
    "layer_norm_linear": (IN, OUT),
    "layer_norm_mlp": (IN, HIDDEN),
    "multihead_attention": (IN, HEADS),
    "transformer_layer": (IN, HIDDEN, HEADS),
}
NO_DROPOUT = {
    "multihead_attention": {"attention_dropout": 0.0},
    "transformer_layer": {"attention_dropout": 0.0, "hidden_dropout": 0.0},
}
LINEARS = ("linear", "grouped_linear", "layer_norm_linear", "layer_norm_mlp")
OPTIONS = {
    "linear": ("bias", "return_bias"),
    "grouped_linear": ("bias", "return_bias"),
    "layer_norm_linear": ("bias", "return_bias", "return_layernorm_output"),
    "layer_norm_mlp": ("bias", "return_bias", "return_layernorm_output"),
}
COMBINATIONS = [
    pytest.param(field, dict(zip(names, values, strict=True)), id=f"{field} {values}")
    for field, names in OPTIONS.items()
    for values in itertools.product((False, True), repeat=len(names))
]
stepping = pytest.mark.parametrize("field", SIZES)
both_modes = pytest.mark.parametrize("use_reentrant", [True, False])


@pytest.fixture
def fp8(classes):
    """Makes a new FP8 autocast for each forward."""
    try:
        TEFp8Config("current").autocast()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    return lambda: TEFp8Config("current").autocast()


@pytest.fixture
def made(classes):
    def make(field, dtype=torch.bfloat16, **options):
        torch.manual_seed(0)
        options = {**NO_DROPOUT.get(field, {}), **options}
        return getattr(classes, field)(*SIZES[field], params_dtype=dtype, **options)

    return make


@pytest.fixture
def norm(classes):
    def make(field, dtype=torch.bfloat16):
        return getattr(classes, field)(IN, dtype=dtype, device="cuda")

    return make


def example(field, seed=0, device="cuda", dtype=torch.bfloat16, requires_grad=False):
    torch.manual_seed(seed)
    shape = (2 * ROWS, IN) if field == "grouped_linear" else (ROWS, 2, IN)
    return torch.randn(shape).to(device, dtype).requires_grad_(requires_grad)


def call(module, field, inp, **keywords):
    more = (torch.tensor([ROWS, ROWS]),) if field == "grouped_linear" else ()
    return module(inp, *more, **keywords)


def bits(tensor):
    return tensor.detach().contiguous().view(torch.int16)


def same(one, other):
    return torch.equal(bits(one), bits(other))


def difference(one, other):
    apart = (one.float() - other.float()).abs()
    number, most = int((apart != 0).sum()), float(apart.max())
    broken = int((~apart.isfinite()).sum())
    return f"{number} of {apart.numel()} values by at most {most}; not finite: {broken}"


def own_of(classes):
    return [[(name, id(value)) for name, value in vars(cls).items()] for _, cls in classes.items()]


def quantized_weights(module):
    return [p for name, p in module.named_parameters() if is_quantized(name)]


def is_quantized(name):
    return "weight" in name and "layer_norm" not in name


# The patch.


def test_the_classes_are_to_the_object_what_they_were(classes):
    before = own_of(classes)
    outer = patch_te()
    with patch_te():
        during = own_of(classes)
        assert during != before
        outer.remove()
        assert own_of(classes) == during
    assert own_of(classes) == before


def test_the_law_of_the_patch_holds(classes, made):
    linear, norm = made("linear"), made("layer_norm_linear")
    inp = example("linear")

    def outputs():
        return [linear(inp, is_first_microbatch=None), norm(inp, None)]

    check_patch_reversible(classes, outputs=outputs)


@stepping
def test_later_microbatches_have_the_bits_of_no_caching(made, fp8, field):
    module = made(field)
    inputs = [example(field, seed) for seed in range(3)]
    plain = []
    for inp in inputs * 2:
        with fp8():
            plain.append(call(module, field, inp))
    # Where two runs without caching differ, the kernels do, and the cache is not to blame.
    for one, other in zip(plain[:3], plain[3:], strict=True):
        assert same(one, other), f"not deterministic without caching: {difference(one, other)}"
    with patch_te():
        for (step, inp), one in zip(accumulate(inputs, len(inputs)), plain[3:], strict=True):
            with step_context(step), fp8():
                out = call(module, field, inp)
            assert same(out, one), f"caching changes the output: {difference(one, out)}"
    kept = [m for m in module.modules() if getattr(m, "_fp8_workspaces", None)]
    assert kept


@pytest.mark.parametrize("field", LINEARS)
def test_gradients_have_the_bits_of_no_caching(made, fp8, field):
    def gradients(steps):
        module = made(field)
        inputs = [example(field, seed, requires_grad=True) for seed in range(3)]
        for first, inp in zip(steps, inputs, strict=True):
            with step_context(first_microbatch=first), fp8():
                call(module, field, inp).float().square().sum().backward()
        return [*(inp.grad for inp in inputs), *(p.grad for p in module.parameters())]

    with patch_te():
        plain, cached = gradients([None] * 3), gradients([True, False, False])
    assert all(same(one, other) for one, other in zip(plain, cached, strict=True))


@stepping
def test_a_changed_weight_is_fresh_in_every_microbatch(made, fp8, field):
    module, inp = made(field), example(field)

    def run(first):
        with step_context(first_microbatch=first), fp8(), torch.no_grad():
            return call(module, field, inp)

    with patch_te():
        before = run(True)
        with torch.no_grad():
            for weight in quantized_weights(module):
                weight.mul_(-1.5)
        later, fresh, again = run(False), run(None), run(True)
    assert not same(fresh, before)
    assert same(later, fresh)
    assert same(again, fresh)


def test_outside_of_every_scope_and_with_none_nothing_is_kept(made, fp8):
    module, inp = made("linear"), example("linear")
    with patch_te():
        with fp8():
            module(inp)
        with step_context(first_microbatch=True), fp8():
            module(inp, is_first_microbatch=None)
        with step_context(first_microbatch=True), fp8():
            module(inp, None)
        assert not module._fp8_workspaces
        with step_context(first_microbatch=True), fp8():
            module(inp)
        assert module._fp8_workspaces


# Recompute, on the threads of CUDA's backward.


@pytest.fixture
def passed(classes):
    """What the forward of Linear is given; the watcher lies below the patch."""
    seen, forward = [], vars(classes.linear)["forward"]

    @functools.wraps(forward)
    def watched(self, *args, **kwargs):
        seen.append(kwargs.get("is_first_microbatch", "nothing"))
        return forward(self, *args, **kwargs)

    classes.linear.forward = watched
    yield seen
    classes.linear.forward = forward


@both_modes
@pytest.mark.parametrize("backward_scope", [None, True, False])
def test_a_recompute_is_given_the_step_of_its_forward(passed, made, use_reentrant, backward_scope):
    module, outs = made("linear"), []
    with patch_te():
        for first in (True, False, None):
            inp = example("linear", requires_grad=True)
            with step_context(first_microbatch=first):
                outs.append(checkpoint(module, inp, use_reentrant=use_reentrant))
        with step_context(first_microbatch=backward_scope):
            for out in outs:
                out.float().sum().backward()
    assert passed == [True, False, "nothing"] * 2


@both_modes
def test_gradients_with_recompute_have_the_bits_of_no_caching(made, fp8, use_reentrant):
    def gradients(steps):
        module = made("linear")
        inputs = [example("linear", seed, requires_grad=True) for seed in range(3)]
        for first, inp in zip(steps, inputs, strict=True):
            # Torch's checkpoint does not restore FP8 in a recompute: the backward belongs inside.
            with step_context(first_microbatch=first), fp8():
                out = checkpoint(module, inp, use_reentrant=use_reentrant)
                out.float().square().sum().backward()
        return [*(inp.grad for inp in inputs), *(p.grad for p in module.parameters())]

    with patch_te():
        plain, cached = gradients([None] * 3), gradients([True, False, False])
    assert all(same(one, other) for one, other in zip(plain, cached, strict=True))


# Shapes without memory.


def described(outputs):
    if isinstance(outputs, tuple | list):
        return type(outputs)(described(item) for item in outputs)
    if outputs is None:
        return None
    return tuple(outputs.shape), outputs.dtype, outputs.requires_grad


def inferred(module, field, inp):
    yield call(module, field, inp.detach().to("meta").requires_grad_(inp.requires_grad))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(inp)
        yield call(module, field, fake)
    yield call(module, field, fake)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("field", "options"), COMBINATIONS)
def test_shapes_and_dtypes_are_those_of_the_real_outputs(made, field, options, requires_grad):
    module, inp = made(field, **options), example(field, requires_grad=requires_grad)
    real = described(call(module, field, inp))
    with patch_te():
        found = [described(outputs) for outputs in inferred(module, field, inp)]
    assert found == [real] * 3


@pytest.mark.parametrize(("field", "options"), COMBINATIONS)
def test_shapes_and_dtypes_under_autocast_are_those_of_the_real_outputs(made, field, options):
    module = made(field, torch.float32, **options)
    inp = example(field, dtype=torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        real = described(call(module, field, inp))
        with patch_te():
            found = [described(outputs) for outputs in inferred(module, field, inp)]
    assert found == [real] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("field", ["rms_norm", "layer_norm"])
def test_norms_infer_the_shape_and_the_dtype_of_the_real_output(norm, field, dtype):
    module, inp = norm(field, dtype), example(field, requires_grad=True)
    real = described(module(inp))
    with patch_te():
        found = [described(outputs) for outputs in inferred(module, field, inp)]
    assert found == [real] * 3


@pytest.mark.parametrize("field", LINEARS)
def test_a_meta_backward_reaches_the_input_and_leaves_real_parameters_alone(made, field):
    module = made(field)
    inp = example(field, device="meta", requires_grad=True)
    with patch_te():
        call(module, field, inp).sum().backward()
    assert inp.grad.is_meta
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_pipeline_stage_of_transformer_engines_modules_runs(made, norm, tmp_path):
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(norm("rms_norm"), made("linear"))
        with patch_te():
            stage = PipelineStage(model, 0, 1, torch.device("cuda"))
            schedule = ScheduleGPipe(stage, 2, loss_fn=lambda out, target: out.float().sum())
            out = schedule.step(example("linear"), target=example("linear"))
    finally:
        torch.distributed.destroy_process_group()
    assert out.shape == (ROWS, 2, OUT)
    assert all(parameter.grad is not None for parameter in model.parameters())


# The builders.


@pytest.mark.parametrize("bias", [True, False])
def test_a_built_linear_is_transformer_engines_and_sees_the_step(classes, fp8, bias):
    before = own_of(classes)
    module, inp = build.linear(IN, OUT, bias=bias, backend="te", device="cuda"), example("linear")
    assert isinstance(module, classes.linear)
    assert module.weight.dtype == torch.bfloat16
    with fp8():
        plain = module(inp)
    assert not module._fp8_workspaces
    for step in (True, False):
        with step_context(first_microbatch=step), fp8():
            assert same(module(inp), plain)
    assert module._fp8_workspaces
    assert own_of(classes) == before


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_from_meta_is_the_one_that_is_built_at_once(classes, bias):
    late = build.linear(IN, OUT, bias=bias, backend="te", device="meta")
    assert all(parameter.is_meta for parameter in late.parameters())
    late.to_empty(device="cuda")
    torch.manual_seed(7)
    late.reset_parameters()
    torch.manual_seed(7)
    at_once = build.linear(IN, OUT, bias=bias, backend="te", device="cuda")
    pairs = list(zip(late.parameters(), at_once.parameters(), strict=True))
    assert len(pairs) == 1 + bias
    assert all(one.is_cuda and same(one, other) for one, other in pairs)
    assert same(late(example("linear")), at_once(example("linear")))


def test_a_norm_from_meta_is_the_one_that_is_built_at_once(classes):
    late = build.rms_norm(IN, backend="te", device="meta")
    assert late.weight.is_meta
    late.to_empty(device="cuda")
    late.reset_parameters()
    at_once = build.rms_norm(IN, backend="te", device="cuda")
    assert isinstance(at_once, classes.rms_norm)
    assert same(late.weight, at_once.weight)
    inp = example("rms_norm")
    assert same(late(inp), at_once(inp))
    assert at_once(inp.to("meta")).shape == inp.shape
    assert "forward" not in vars(classes.rms_norm)


def test_a_built_linear_is_copied_as_itself_and_has_the_keys_of_its_class(classes):
    module = build.linear(IN, OUT, bias=True, backend="te", device="cuda")
    other = copy.deepcopy(module)
    assert type(other) is type(module)
    plain = classes.linear(IN, OUT, params_dtype=torch.bfloat16)
    assert list(module.state_dict()) == list(plain.state_dict())
    assert same(other(example("linear")), module(example("linear")))


@pytest.mark.usefixtures("classes")
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_built_attention_computes_what_the_written_out_one_does(is_causal, scale):
    options = {"is_causal": is_causal, "scale": scale}
    heads = [torch.randn(2, 64, count, 64, device="cuda") for count in (8, 2, 2)]
    weights = torch.randn(2, 64, 8, 64, device="cuda")

    def numbers(backend, dtype):
        given = [each.to(dtype).requires_grad_() for each in heads]
        found = build.attention(backend=backend, **options)(*given)
        return [found, *torch.autograd.grad(found, given, weights.to(dtype))]

    for found, expected in zip(
        numbers("te", torch.bfloat16), numbers("eager", torch.float64), strict=True
    ):
        assert found.dtype == torch.bfloat16
        assert (found.double() - expected).norm() < 1e-2 * expected.norm()
