import inspect
import threading
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from automodel_fn import PatchError, StepContext, accumulate, current_step, step_context
from automodel_fn.te._forward import with_step, wrapped_forward
from automodel_fn.te._patch import patch_classes

STEPPING = (
    "linear",
    "grouped_linear",
    "layer_norm_linear",
    "layer_norm_mlp",
    "multihead_attention",
    "transformer_layer",
)
both_modes = pytest.mark.parametrize("use_reentrant", [True, False])
steps = pytest.mark.parametrize("first", [True, False])
stepping = pytest.mark.parametrize("field", STEPPING)


def parameters_of(cls):
    return list(inspect.signature(cls.forward).parameters)[1:]


@pytest.fixture
def told(recording):
    """Calls a patched class whose forward tells what it is given, and returns that."""
    classes, seen = recording
    with patch_classes(classes, current_step):

        def call(field, *args, **kwargs):
            getattr(classes, field).forward(torch.nn.Module(), *args, **kwargs)
            return seen.pop()

        yield classes, call


# What is passed through.


@stepping
def test_all_arguments_pass_through_by_position(told, field):
    classes, call = told
    values = [object() for _ in parameters_of(getattr(classes, field))]
    with step_context(first_microbatch=True):
        got = call(field, *values)
    assert got.args == tuple(values)
    assert got.kwargs == {}


@stepping
def test_all_arguments_pass_through_by_keyword(told, field):
    classes, call = told
    values = {name: object() for name in parameters_of(getattr(classes, field))}
    with step_context(first_microbatch=True):
        got = call(field, **values)
    assert got.args == ()
    assert got.kwargs == values


@stepping
def test_all_but_the_microbatch_pass_through_and_it_is_added(told, field):
    classes, call = told
    names = [n for n in parameters_of(getattr(classes, field)) if n != "is_first_microbatch"]
    values = {name: object() for name in names}
    with step_context(first_microbatch=False):
        got = call(field, **values)
    assert got.args == ()
    assert got.kwargs == {**values, "is_first_microbatch": False}


@steps
@stepping
def test_the_step_is_added_as_a_keyword(told, field, first):
    _, call = told
    inp = object()
    with step_context(first_microbatch=first):
        got = call(field, inp)
    assert got.args == (inp,)
    assert got.kwargs == {"is_first_microbatch": first}
    assert got.kwargs["is_first_microbatch"] is first


@stepping
def test_the_input_may_be_given_by_keyword(told, field):
    classes, call = told
    name = parameters_of(getattr(classes, field))[0]
    inp = object()
    with step_context(first_microbatch=True):
        got = call(field, **{name: inp})
    assert (got.args, got.kwargs) == ((), {name: inp, "is_first_microbatch": True})


@pytest.mark.parametrize("scope", [None, StepContext(), StepContext(optim_step=True)])
@stepping
def test_a_step_that_is_off_adds_nothing_at_all(told, field, scope):
    _, call = told
    inp = object()
    if scope is None:
        got = call(field, inp)
    else:
        with step_context(first_microbatch=True), step_context(scope):
            got = call(field, inp)
    assert (got.args, got.kwargs) == ((inp,), {})


@pytest.mark.parametrize("given", [True, False, None])
@stepping
def test_an_argument_of_the_caller_wins_also_none(told, field, given):
    classes, call = told
    place = parameters_of(getattr(classes, field)).index("is_first_microbatch")
    before = [object() for _ in range(place)]
    for first in (True, False, None):
        with step_context(first_microbatch=first):
            by_name = call(field, before[0], is_first_microbatch=given)
            by_place = call(field, *before, given)
        assert by_name.kwargs == {"is_first_microbatch": given}
        assert by_place.args == (*before, given)
        assert by_place.kwargs == {}


def test_what_comes_after_the_microbatch_may_be_given_by_position(told):
    _, call = told
    with step_context(first_microbatch=True):
        got = call("linear", "x", None, True, True)
    assert (got.args, got.kwargs) == (("x", None, True, True), {})


def test_grouped_linear_takes_its_output_buffers(patched, made, called, example):
    grouped = made(patched, "grouped_linear")
    plain = called(grouped, "grouped_linear", example("grouped_linear"))
    buffer = torch.zeros(5, 6)
    with step_context(first_microbatch=True), torch.no_grad():
        out = called(grouped, "grouped_linear", example("grouped_linear"), out=buffer)
    assert out is buffer
    assert torch.equal(buffer, plain)


def test_the_norms_take_what_they_took(patched, made, example):
    norm = made(patched, "rms_norm")
    inp = example("rms_norm")
    with step_context(first_microbatch=True):
        assert torch.equal(norm(input=inp), norm(inp, "extra", other=1))


# What is kept of the function.


@pytest.mark.parametrize("field", [*STEPPING, "rms_norm", "layer_norm"])
def test_the_signature_and_the_documentation_are_kept(classes, field):
    cls = getattr(classes, field)
    before = cls.forward
    with patch_classes(classes, current_step):
        assert cls.forward is not before
        assert inspect.signature(cls.forward) == inspect.signature(before)
        assert inspect.unwrap(cls.forward) is before
        for name in ("__name__", "__qualname__", "__doc__", "__module__"):
            assert getattr(cls.forward, name) == getattr(before, name)


def test_wrapping_is_a_function_of_its_arguments(classes):
    forward = wrapped_forward(classes.linear.forward, "linear", lambda: StepContext(True), "Linear")
    layer = classes.linear(4, 6)
    for _ in range(2):
        forward(layer, torch.ones(1, 4))
    assert layer.num_quantizations == 2
    assert layer._fp8_workspaces.keys() == {"weight"}
    layer(torch.ones(1, 4))
    assert layer.num_quantizations == 3


def test_a_keyword_only_microbatch_is_given_by_keyword():
    def forward(self, inp, *more, is_first_microbatch=None):
        return more, is_first_microbatch

    wrapped = with_step(forward, lambda: StepContext(True), "Own")
    assert wrapped(None, 1, 2, 3, 4) == ((2, 3, 4), True)
    assert wrapped(None, 1, 2, is_first_microbatch=None) == ((2,), None)


@pytest.mark.parametrize("forward", [lambda self, inp: inp, lambda self, *args, **kwargs: args])
def test_a_forward_without_the_parameter_is_an_error_that_names_it(forward):
    with pytest.raises(PatchError, match=r"Own.forward has no parameter is_first_microbatch"):
        with_step(forward, StepContext, "Own")


# What it does.


@stepping
def test_the_weight_is_quantized_once_a_step_and_every_bit_is_the_same(
    classes, made, called, example, field
):
    inputs = [example(field) * scale for scale in (1.0, -2.0, 0.5)]
    plain = made(classes, field)
    expected = [called(plain, field, inp) for _ in range(2) for inp in inputs]
    with patch_classes(classes, current_step):
        module = made(classes, field)
        got = []
        for step, inp in accumulate(inputs * 2, len(inputs)):
            with step_context(step):
                got.append(called(module, field, inp))
    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))
    counted = [m for m in module.modules() if hasattr(m, "num_quantizations")]
    weights = [
        name for m in counted for name, _ in m.named_parameters(recurse=False) if is_quantized(name)
    ]
    assert sum(m.num_quantizations for m in counted) == 2 * len(weights)


def is_quantized(name):
    return "weight" in name and "layer_norm" not in name


@stepping
def test_gradients_of_a_step_are_those_without_caching(classes, made, called, example, field):
    inputs = [example(field) * scale for scale in (1.0, -2.0, 0.5)]
    plain = made(classes, field)
    for inp in inputs:
        called(plain, field, inp).square().sum().backward()
    with patch_classes(classes, current_step):
        module = made(classes, field)
        for step, inp in accumulate(inputs, len(inputs)):
            with step_context(step):
                called(module, field, inp).square().sum().backward()
    for one, other in zip(plain.parameters(), module.parameters(), strict=True):
        assert torch.equal(one.grad.view(torch.int32), other.grad.view(torch.int32))


def test_a_changed_weight_is_seen_in_every_microbatch_and_by_validation(patched, made):
    layer, x = made(patched, "linear"), torch.ones(1, 4)
    with step_context(first_microbatch=True):
        before = layer(x)
    with torch.no_grad():
        layer.weight.add_(1)
    outs = [layer(x)]  # validation, outside of every scope
    for first in (False, True, False):
        with step_context(first_microbatch=first):
            outs.append(layer(x))
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert not torch.equal(outs[0], before)


@steps
def test_the_parts_of_a_composite_get_what_the_composite_got(patched, made, example, first):
    layer = made(patched, "transformer_layer")
    seen = {}
    for name, part in layer.named_modules():
        if name:

            def keep(module, args, kwargs, name=name):
                seen[name] = kwargs

            part.register_forward_pre_hook(keep, with_kwargs=True)
    with step_context(first_microbatch=first):
        layer(example("transformer_layer"))
    expected = {"self_attention", "layernorm_mlp"}
    expected |= {"self_attention.layernorm_qkv", "self_attention.proj"}
    assert seen == {name: {"is_first_microbatch": first} for name in expected}


def test_none_given_to_a_composite_reaches_its_parts(patched, made, example):
    layer = made(patched, "transformer_layer")
    with step_context(first_microbatch=True):
        layer(example("transformer_layer"), is_first_microbatch=None)
    assert not layer.layernorm_mlp._fp8_workspaces
    assert not layer.self_attention.proj._fp8_workspaces


def test_an_error_of_the_forward_is_the_callers(patched, made):
    with step_context(first_microbatch=True), pytest.raises(RuntimeError, match="shape"):
        made(patched, "linear")(torch.ones(1, 3))


def test_each_thread_passes_its_own_step(patched, made):
    layers = [made(patched, "linear") for _ in range(2)]
    turns = threading.Barrier(2, timeout=30)

    def work(layer, first):
        with step_context(first_microbatch=first):
            turns.wait()
            layer(torch.ones(1, 4))
            turns.wait()

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(layers, (True, None), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sorted(layer._fp8_workspaces) for layer in layers] == [["weight"], []]


# Recompute.


@both_modes
@pytest.mark.parametrize("backward_scope", ["none", True, False, None])
def test_a_recompute_passes_the_step_of_its_forward(
    patched, made, example, use_reentrant, backward_scope
):
    layer = made(patched, "linear")
    passed = watch(layer)
    outs = []
    for first in (True, False, None):
        inp = example("linear", requires_grad=True)
        with step_context(first_microbatch=first):
            outs.append(checkpoint(layer, inp, use_reentrant=use_reentrant))
    scope = StepContext() if backward_scope == "none" else StepContext(backward_scope)
    for out in outs:
        if backward_scope == "none":
            out.sum().backward()
        else:
            with step_context(scope):
                out.sum().backward()
    assert passed == [True, False, None] * 2


def watch(layer):
    """What the quantizing rule of a stand-in is given, call by call."""
    passed = []
    quantized = layer.quantized

    def tell(name, is_first_microbatch, dtype):
        passed.append(is_first_microbatch)
        return quantized(name, is_first_microbatch, dtype)

    layer.quantized = tell
    return passed


@both_modes
@stepping
def test_a_step_with_recompute_is_bit_equal_to_no_caching(
    classes, made, called, example, field, use_reentrant
):
    def run(scopes):
        module = made(classes, field)
        inp = example(field, requires_grad=True)
        once = partial(checkpoint, use_reentrant=use_reentrant)
        outs = []
        for scope in scopes:
            with step_context(scope):
                outs.append(once(partial(called, module, field), inp))
        for out in outs:
            out.square().sum().backward()
        return [inp.grad, *(p.grad for p in module.parameters())]

    plain = run([StepContext()] * 3)
    with patch_classes(classes, current_step):
        cached = run([StepContext(True), StepContext(False), StepContext(False)])
    for one, other in zip(plain, cached, strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


# Compiled code.


class CountingBackend:
    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("field", ["linear", "layer_norm_linear", "layer_norm_mlp"])
def test_compiled_code_passes_nothing_and_never_compiles_anew(
    patched, made, example, field, compiled_forward
):
    layer, backend = made(patched, field), CountingBackend()
    compiled = compiled_forward(layer, backend=backend)
    for first in (True, False, None, True):
        strict = torch._dynamo.config.patch(error_on_recompile=True)
        with strict, step_context(first_microbatch=first):
            compiled(example(field))
        assert layer._fp8_workspaces == {}
    assert backend.graphs == 1


def test_eager_code_between_passes_the_step_again(patched, made, example, compiled_forward):
    layer = made(patched, "linear")
    with step_context(first_microbatch=True):
        compiled_forward(layer, backend="eager")(example("linear"))
        assert not layer._fp8_workspaces
        layer(example("linear"))
        assert layer._fp8_workspaces
