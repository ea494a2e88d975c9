import importlib.util
import warnings

import pytest
import torch

from automodel_fn import BackendConfig, BackendUnavailableError, TEFp8Config, probe, resolve

RECIPES = ("current", "block", "mxfp8")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
needs_engine = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
)


@pytest.fixture
def engine():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where JAX is installed, and no extension for it
        import transformer_engine.pytorch as engine

    return engine


def test_the_default_runs_here_and_takes_grouped_products():
    found = resolve(BackendConfig(), probe())

    assert found.backend.experts == "torch_mm"
    assert resolve(found.backend, probe()).backend == found.backend


def test_a_bf16_product_of_groups_can_run_where_the_verdict_says_so():
    assert probe().verdict("experts=torch_mm").can_run
    tokens = torch.randn(8, 16, device="cuda", dtype=torch.bfloat16)
    weights = torch.randn(2, 16, 32, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor([3, 8], device="cuda", dtype=torch.int32)

    out = torch._grouped_mm(tokens, weights, offs=ends)

    expected = torch.cat([tokens[:3] @ weights[0], tokens[3:] @ weights[1]])
    torch.testing.assert_close(out, expected, atol=1e-1, rtol=2e-2)


@needs_engine
def test_the_default_takes_transformer_engine_but_for_attention():
    backend = resolve(BackendConfig(), probe()).backend

    assert (backend.attn, backend.linear, backend.rope_fusion) == ("sdpa", "te", True)


@needs_engine
def test_verdicts_on_recipes_are_those_of_transformer_engine(engine):
    said = {
        "current": engine.is_fp8_available(),
        "block": engine.is_fp8_block_scaling_available(),
        "mxfp8": engine.is_mxfp8_available(),
    }

    assert {name: probe().verdict(f"te_fp8={name}").can_run for name in RECIPES} == said


@needs_engine
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layer_runs_in_fp8_or_the_error_says_why_not(engine, recipe):
    layer = engine.Linear(128, 128, bias=False, params_dtype=torch.bfloat16).cuda()
    x = torch.randn(128, 128, device="cuda", dtype=torch.bfloat16)
    config = TEFp8Config(recipe)
    if not probe().verdict(f"te_fp8={recipe}").can_run:
        with pytest.raises(BackendUnavailableError, match="compute capability"):
            config.autocast()
        return
    exact = layer(x)

    with config.autocast():
        rough = layer(x)

    error = (rough - exact).norm() / exact.norm()
    assert 0.001 < error < 0.1


@needs_engine
def test_a_recipe_object_of_transformer_engine_is_entered_as_it_is(engine):
    from transformer_engine.common.recipe import DelayedScaling

    recipe = DelayedScaling(amax_history_len=4)
    config = TEFp8Config(recipe)

    assert (config.kind, config.build_recipe()) == ("delayed", recipe)
    with config.autocast():
        engine.Linear(128, 128).cuda()(torch.randn(128, 128, device="cuda"))


@needs_engine
def test_what_autocast_judges_is_what_a_probe_finds():
    from automodel_fn.backend._fp8 import _found

    found, whole = _found("2.20.2"), probe()

    assert found.devices == whole.devices[: len(found.devices)]
    assert found.cuda == whole.cuda
