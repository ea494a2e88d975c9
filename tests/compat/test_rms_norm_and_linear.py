import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from automodel_fn import BackendUnavailableError, ConfigError, step_context
from automodel_fn.compat import nemo
from automodel_fn.te._patch import patch_te
from automodel_fn.testing import norm_arguments
from automodel_fn.testing._twin import bits_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def tensors(x, weight, requires_grad):
    return [tensor.detach().clone().requires_grad_(requires_grad) for tensor in (x, weight)]


def norm_inputs(found):
    """A norm of floats that both compute in float32, with a weight."""
    is_float = found["x"].dtype in FLOATS
    return is_float and found["weight"] is not None and found["weight_multiply"] == "fp32"


@given(norm_arguments().filter(norm_inputs), st.booleans())
def test_the_norm_has_the_bits_that_it_has_in_the_original(original, found, requires_grad):
    with torch.compiler.set_stance("force_eager"):
        outs = [
            module._float32_rms_norm_fwd(
                *tensors(found["x"], found["weight"], requires_grad), found["eps"]
            )
            for module in (nemo, original)
        ]
    assert (outs[0].dtype, outs[0].shape) == (outs[1].dtype, outs[1].shape)
    assert torch.equal(bits_of(outs[0]), bits_of(outs[1]))


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (0, 8)])
@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_module_computes_as_that_of_the_original(original, uncompiled, dtype, stored, shape):
    torch.manual_seed(0)
    x, upstream = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.randn(8).to(stored)
    results = []
    for module in (nemo, original):
        norm = module.Float32RMSNorm(8, eps=1e-6, dtype=stored)
        with torch.no_grad():
            norm.weight.copy_(weight)
        given = x.clone().requires_grad_()
        out = norm(given)
        out.backward(upstream)
        results.append((out, given.grad, norm.weight.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
    assert torch.equal(bits_of(results[0][0]), bits_of(results[1][0]))
    # Ours is differentiated by torch, theirs by hand: the sums are rounded in another order, which
    # is at most a few units in the last place of the narrower dtype.
    for ours, theirs in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_are_as_near_to_the_exact_ones_as_those_of_the_original(original, uncompiled):
    torch.manual_seed(0)
    x, weight, upstream = torch.randn(64, 32), torch.randn(32), torch.randn(64, 32)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    nn.functional.rms_norm(exact[0], (32,), exact[1], 1e-6).backward(upstream.double())
    errors = []
    for module in (nemo, original):
        given = tensors(x, weight, True)
        module._float32_rms_norm_fwd(*given, 1e-6).backward(upstream)
        pairs = zip(given, exact, strict=True)
        errors.append(max(float((a.grad - b.grad).abs().max()) for a, b in pairs))
    assert errors[0] < 2 * errors[1] < 1e-4


def test_a_frozen_weight_gets_no_gradient(original, uncompiled):
    for module in (nemo, original):
        x, weight = torch.randn(2, 4, requires_grad=True), torch.ones(4)
        module._float32_rms_norm_fwd(x, weight, 1e-5).sum().backward()
        assert x.grad is not None
        assert weight.grad is None


def test_a_norm_has_the_state_and_the_defaults_of_the_original(original):
    ours, theirs = (module.Float32RMSNorm(4) for module in (nemo, original))
    assert ours.eps == theirs.eps == 1e-5
    assert ours.weight.dtype == theirs.weight.dtype == torch.bfloat16
    assert torch.equal(ours.weight, theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    for norm in (ours, theirs):
        with torch.no_grad():
            norm.weight.fill_(3)
        norm.reset_parameters()
        assert norm.weight.tolist() == [1.0] * 4


def test_a_norm_can_be_made_on_the_meta_device(original):
    for module in (nemo, original):
        norm = module.Float32RMSNorm(4, device="meta", dtype=torch.float32)
        assert norm.weight.is_meta
        norm.to_empty(device="cpu").reset_parameters()
        assert norm.weight.tolist() == [1.0] * 4


def test_float64_is_computed_in_float64_where_the_original_rounds_it(original, uncompiled):
    x = torch.randn(3, 8, dtype=torch.float64)
    weight = torch.ones(8, dtype=torch.float64)
    exact = nn.functional.rms_norm(x, (8,), weight, 1e-6)
    ours, theirs = (m._float32_rms_norm_fwd(x, weight, 1e-6) for m in (nemo, original))
    assert ours.dtype == theirs.dtype == torch.float64
    assert float((ours - exact).abs().max()) < 1e-14 < float((theirs - exact).abs().max())


@pytest.mark.parametrize("arguments", [{"dim": [4]}, {"dim": 0}, {"dim": 4, "eps": -1.0}])
def test_a_norm_that_cannot_be_meant_is_refused(arguments, original):
    original.Float32RMSNorm(**arguments)
    with pytest.raises(ConfigError, match="Float32RMSNorm cannot be made"):
        nemo.Float32RMSNorm(**arguments)


# Linear layers and norms by name.


@pytest.fixture
def engine(transformer_engine, monkeypatch):
    """Stand-ins for Transformer Engine, and a patch of them by compat that ends with the test."""
    handles = []

    def patch():
        handles.append(patch_te())
        return handles[-1]

    monkeypatch.setattr(nemo, "patch_te", patch)
    monkeypatch.setattr(nemo, "_patch_te_modules", nemo._make_lazy_te_patcher())
    yield transformer_engine.classes
    for handle in handles:
        handle.remove()


@pytest.fixture
def patching(module, engine, monkeypatch):
    """Ours or the original, which has not patched the stand-ins yet."""
    if module is not nemo:
        monkeypatch.setattr(module, "_patch_te_modules", module._make_lazy_te_patcher())
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", [None, "cpu", "meta"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_torch_linear_is_the_one_of_the_original(original, bias, device, dtype):
    made = []
    for module in (nemo, original):
        torch.manual_seed(0)
        made.append(module.initialize_linear_module("torch", 3, 2, bias, device, dtype))
    assert type(made[0]) is type(made[1]) is nn.Linear
    assert same_tensors(*made)


@pytest.mark.parametrize("device", [None, "cpu", "meta"])
@pytest.mark.parametrize("backend", ["torch", "torch_fp32"])
def test_a_torch_norm_is_the_one_of_the_original(original, backend, device):
    ours, theirs = (
        m.initialize_rms_norm_module(backend, 4, 1e-6, device, torch.float32)
        for m in (nemo, original)
    )
    assert type(ours).__name__ == type(theirs).__name__
    assert ours.eps == theirs.eps == 1e-6
    assert same_tensors(ours, theirs)


def same_tensors(ours, theirs):
    pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    return all(
        name == other
        and a.dtype == b.dtype
        and a.device == b.device
        and a.shape == b.shape
        and (a.is_meta or torch.equal(a, b))
        for (name, a), (other, b) in pairs
    )


def test_defaults_are_a_linear_without_bias_and_bf16():
    assert nemo.initialize_linear_module("torch", 2, 2).bias is None
    assert nemo.initialize_linear_module("torch", 2, 2).weight.dtype == torch.bfloat16
    assert nemo.initialize_rms_norm_module("torch_fp32", 2).weight.dtype == torch.bfloat16
    assert nemo.initialize_rms_norm_module("torch_fp32", 2).eps == 1e-5


def test_the_fp32_norm_is_the_public_class():
    assert type(nemo.initialize_rms_norm_module("torch_fp32", 2)) is nemo.Float32RMSNorm


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_transformer_engine_layers_are_of_its_own_classes(engine, patching, device):
    linear = patching.initialize_linear_module("te", 3, 2, True, device, torch.float32)
    norm = patching.initialize_rms_norm_module("te", 4, 1e-6, device, torch.float32)
    assert type(linear) is engine.linear
    assert type(norm) is engine.rms_norm
    assert norm.eps == 1e-6
    for parameter in (linear.weight, linear.bias, norm.weight):
        assert (parameter.device.type, parameter.dtype) == (device, torch.float32)


def test_the_first_transformer_engine_layer_patches_and_later_ones_do_not(engine):
    before = engine.linear.forward
    nemo.initialize_linear_module("torch", 2, 2)
    nemo.initialize_rms_norm_module("torch_fp32", 2)
    assert engine.linear.forward is before
    nemo.initialize_rms_norm_module("te", 2)
    patched = engine.linear.forward
    assert patched is not before
    nemo.initialize_linear_module("te", 2, 2)
    nemo._patch_te_modules()
    assert engine.linear.forward is patched


def quantizations(module, step):
    layer = module.initialize_linear_module("te", 2, 2, dtype=torch.float32)
    x = torch.ones(1, 2)
    for first in step:
        module.set_is_first_microbatch(first)
        layer(x)
    return layer.num_quantizations


@pytest.mark.parametrize(
    ("step", "count"), [((None, None), 2), ((True, False, False), 1), ((True, True), 2)]
)
def test_a_patched_layer_sees_the_flag(patching, step, count):
    assert quantizations(patching, step) == count


def test_a_patched_layer_sees_a_step_context(engine):
    layer = nemo.initialize_linear_module("te", 2, 2, dtype=torch.float32)
    for first in (True, False):
        with step_context(first_microbatch=first):
            layer(torch.ones(1, 2))
    assert layer.num_quantizations == 1


def test_arguments_keep_their_names_and_order(engine):
    layer = nemo.initialize_linear_module("te", 2, 2, dtype=torch.float32)
    expected = layer(torch.ones(1, 2))
    assert torch.equal(layer(inp=torch.ones(1, 2)), expected)
    assert torch.equal(layer(torch.ones(1, 2), None, False), expected)


@pytest.fixture
def original_patch(original, monkeypatch):
    monkeypatch.setattr(original, "_patch_te_modules", original._make_lazy_te_patcher())


def test_the_original_renames_and_drops_arguments(engine, original, original_patch):
    layer = original.initialize_linear_module("te", 2, 2, dtype=torch.float32)
    with pytest.raises(TypeError):
        layer(inp=torch.ones(1, 2))
    with pytest.raises(TypeError):
        layer(torch.ones(1, 2), None, False)


def test_six_classes_see_the_step_where_the_original_patches_three(
    engine, original, original_patch
):
    before = {cls: cls.forward for _, cls in engine.items()}
    original._patch_te_modules()
    changed = [cls.__name__ for cls, forward in before.items() if cls.forward is not forward]
    assert changed == ["Linear", "GroupedLinear", "RMSNorm"]
    for cls, forward in before.items():
        cls.forward = forward
    nemo._patch_te_modules()
    assert all(cls.forward is not before[cls] for cls in engine.stepping())


def test_an_input_without_memory_gives_a_shape_in_both(patching):
    layer = patching.initialize_linear_module("te", 3, 2, device="meta", dtype=torch.float32)
    out = layer(torch.ones(5, 3, device="meta"))
    assert (out.shape, out.dtype, out.device.type) == ((5, 2), torch.float32, "meta")
    # The original cuts the graph here.
    assert out.requires_grad is (patching is nemo)


def test_an_input_of_no_rows_is_computed_where_the_original_makes_an_output_up(patching):
    layer = patching.initialize_linear_module("te", 3, 2, dtype=torch.float32)
    assert layer(torch.ones(0, 3)).shape == (0, 2)
    assert layer.num_quantizations == (1 if patching is nemo else 0)


def hide(monkeypatch, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize("package", ["quack", "te"])
@pytest.mark.parametrize("name", ["initialize_linear_module", "initialize_rms_norm_module"])
def test_a_package_that_is_missing_is_an_import_error(name, package, original, monkeypatch):
    hide(monkeypatch, "transformer_engine" if package == "te" else "quack")
    sizes = (2, 2) if "linear" in name else (2,)
    for module in (nemo, original):
        with pytest.raises(ImportError):
            getattr(module, name)(package, *sizes)
    with pytest.raises(BackendUnavailableError):
        getattr(nemo, name)(package, *sizes)


def test_the_message_names_the_package_of_quack(original, monkeypatch):
    hide(monkeypatch, "quack")
    for module in (nemo, original):
        with pytest.raises(ImportError, match="rms_norm='quack' requires the 'quack-kernels'"):
            module.initialize_rms_norm_module("quack", 2)
        with pytest.raises(ImportError, match="linear='quack' requires the 'quack-kernels'"):
            module.initialize_linear_module("quack", 2, 2)


def test_quack_is_used_where_it_is_installed(original, monkeypatch):
    made = {name: types.ModuleType(name) for name in ("quack", "quack.linear", "quack.rmsnorm")}
    made["quack.linear"].Linear = type("Linear", (nn.Linear,), {})
    made["quack.rmsnorm"].QuackRMSNorm = type("QuackRMSNorm", (nn.RMSNorm,), {})
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    for module in (nemo, original):
        linear = module.initialize_linear_module("quack", 3, 2, True, "meta", torch.float32)
        norm = module.initialize_rms_norm_module("quack", 4, 1e-6, "meta", torch.float32)
        assert type(linear) is made["quack.linear"].Linear
        assert type(norm) is made["quack.rmsnorm"].QuackRMSNorm
        assert (linear.weight.shape, norm.eps, norm.weight.is_meta) == ((2, 3), 1e-6, True)


@pytest.mark.parametrize("backend", ["bogus", "", None, "TE"])
def test_an_unknown_backend_is_a_value_error_with_the_words_of_the_original(backend, original):
    for module in (nemo, original):
        with pytest.raises(ValueError, match=f"Unsupported Linear implementation: {backend}"):
            module.initialize_linear_module(backend, 2, 2)
        with pytest.raises(ValueError, match=f"Unsupported RMSNorm implementation: {backend}"):
            module.initialize_rms_norm_module(backend, 2)
