# Training in FP8 with cached weights: recipes, recomputes, changed weights, validation.
import copy
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from automodel_fn import (
    BackendUnavailableError,
    StaleWeightError,
    TEFp8Config,
    accumulate,
    cache_counts,
    current_step,
    invalidate,
    patch_te,
    step_context,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # Transformer Engine warns of much that is not ours.
    pytest.mark.filterwarnings("ignore"),
]
IN, OUT, HIDDEN, HEADS, ROWS = 256, 384, 512, 4, 128
SIZES = {
    "linear": (IN, OUT),
    "grouped_linear": (2, IN, OUT),
    "layer_norm_linear": (IN, OUT),
    "layer_norm_mlp": (IN, HIDDEN),
    "multihead_attention": (IN, HEADS),
    "transformer_layer": (IN, HIDDEN, HEADS),
}
OPTIONS = {
    "multihead_attention": {"attention_dropout": 0.0},
    "transformer_layer": {"attention_dropout": 0.0, "hidden_dropout": 0.0},
}
# Delayed scaling takes a weight's scale from the microbatches before: cached, it stays that of the
# first microbatch. A value moves by one step of E4M3 at most, and no norm by more than 0.104 when
# this was measured, about as far as each way is from bf16.
DELAYED_BOUND = 2**-3
NUM_MICROBATCHES = 4
NOT_CACHED = {"is_first_microbatch": None}
MODES = {"kept": None, "non-reentrant": False, "reentrant": True}

stepping = pytest.mark.parametrize("field", SIZES)
exact_recipes = pytest.mark.parametrize("recipe", ["current", "block"])
modes = pytest.mark.parametrize("use_reentrant", MODES.values(), ids=MODES)


@pytest.fixture
def made(classes):
    def make(field):
        torch.manual_seed(0)
        options = OPTIONS.get(field, {})
        return getattr(classes, field)(*SIZES[field], params_dtype=torch.bfloat16, **options)

    return make


def fp8(recipe):
    if recipe == "delayed":
        from transformer_engine.common.recipe import DelayedScaling

        return TEFp8Config(DelayedScaling()).autocast()
    return TEFp8Config(recipe).autocast()


def example(field, seed):
    torch.manual_seed(seed)
    shape = (2 * ROWS, IN) if field == "grouped_linear" else (ROWS, 2, IN)
    return torch.randn(shape).to("cuda", torch.bfloat16).requires_grad_()


def call(module, field, inp, **keywords):
    more = (torch.tensor([ROWS, ROWS]),) if field == "grouped_linear" else ()
    return module(inp, *more, **keywords)


def step_of(module, field, recipe, use_reentrant, is_cached):
    """One optimizer step's outputs and gradients."""
    inputs = [example(field, seed) for seed in range(NUM_MICROBATCHES)]
    outs = []
    for step, inp in accumulate(inputs, NUM_MICROBATCHES):
        first = step.first_microbatch if is_cached else None
        with step_context(first_microbatch=first), fp8(recipe):
            run = partial(call, module, field)
            if use_reentrant is None:
                out = run(inp)
            else:
                out = checkpoint(run, inp, use_reentrant=use_reentrant)
            # Torch's checkpoint does not restore FP8 in a recompute: the backward belongs inside.
            out.float().square().sum().backward()
        outs.append(out.detach())
    return [*outs, *(i.grad for i in inputs), *(p.grad for p in module.parameters())]


def names_of(module):
    outs = [
        f"{what} {index}" for what in ("out", "input grad") for index in range(NUM_MICROBATCHES)
    ]
    return [*outs, *(name for name, _ in module.named_parameters())]


def same(one, other):
    return torch.equal(one.contiguous().view(torch.int16), other.contiguous().view(torch.int16))


def differing(one, other):
    return [index for index, pair in enumerate(zip(one, other, strict=True)) if not same(*pair)]


@modes
@exact_recipes
@stepping
def test_four_cached_microbatches_have_the_bits_of_no_caching(made, field, recipe, use_reentrant):
    # Two runs without caching first: where those differ it is the kernels, not the cache.
    plain, again = (step_of(made(field), field, recipe, use_reentrant, False) for _ in range(2))
    assert differing(plain, again) == [], "not deterministic without caching either"
    module = made(field)
    with patch_te():
        cached = step_of(module, field, recipe, use_reentrant, True)
    assert differing(plain, cached) == []
    counts = cache_counts(module)
    assert counts.reused >= NUM_MICROBATCHES - 1
    assert counts.refreshed == 0


@modes
@stepping
def test_delayed_scaling_stays_within_its_bound(made, field, use_reentrant):
    plain = step_of(made(field), field, "delayed", use_reentrant, False)
    with patch_te():
        cached = step_of(made(field), field, "delayed", use_reentrant, True)
    for name, one, other in zip(names_of(made(field)), plain, cached, strict=True):
        # The softmax takes a bias of the keys out: its gradient is zero but for rounding.
        if not name.endswith("key_bias"):
            error = (one.float() - other.float()).norm() / one.float().norm().clamp_min(1e-12)
            assert error <= DELAYED_BOUND, name


@exact_recipes
@pytest.mark.parametrize("field", ["linear", "grouped_linear", "layer_norm_linear"])
def test_a_module_called_twice_in_a_microbatch_has_the_bits_of_no_caching(made, field, recipe):
    def outcome(module, is_cached):
        inputs = [example(field, seed) for seed in range(4)]
        outs = []
        for step, pair in accumulate([inputs[:2], inputs[2:]], 2):
            first = step.first_microbatch if is_cached else None
            with step_context(first_microbatch=first), fp8(recipe):
                both = [call(module, field, inp) for inp in pair]
                sum(out.float().square().sum() for out in both).backward()
            outs += [out.detach() for out in both]
        return [*outs, *(i.grad for i in inputs), *(p.grad for p in module.parameters())]

    plain, module = outcome(made(field), False), made(field)
    with patch_te():
        cached = outcome(module, True)
    assert differing(plain, cached) == []
    counts = cache_counts(module)
    assert (counts.filled, counts.repeated, counts.reused, counts.refreshed) == (1, 1, 2, 0)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() >= (10, 0),
    reason="this GPU runs mxfp8",
)
def test_mxfp8_on_a_gpu_that_lacks_it_is_an_error_that_says_so():
    with pytest.raises(BackendUnavailableError, match="mxfp8"):
        TEFp8Config("mxfp8").autocast()


def changed_by_fused_adamw(module):
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(module.parameters(), lr=0.1, fused=True).step()


def changed_in_place(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(-1.5)


def changed_by_loading(module):
    state = {
        name: tensor * -1.5
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        else tensor
        for name, tensor in module.state_dict().items()
    }
    module.load_state_dict(state)


def changed_behind_the_back(module):
    for parameter in module.parameters():
        parameter.data.mul_(-1.5)
    invalidate(module)


CHANGES = (changed_by_fused_adamw, changed_in_place, changed_by_loading, changed_behind_the_back)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@exact_recipes
@stepping
def test_a_later_microbatch_gives_the_new_weights_output(made, field, recipe, change):
    module, inp = made(field), example(field, 0).detach()

    def run(first):
        with step_context(first_microbatch=first), fp8(recipe), torch.no_grad():
            return call(module, field, inp)

    with patch_te():
        before = run(True)
        change(module)
        later, fresh = run(False), run(None)
        assert not same(later, before)
        assert same(later, fresh)
        assert cache_counts(module).refreshed == 1


@stepping
def test_delayed_scaling_takes_the_new_weight_as_without_caching(made, field):
    inp = example(field, 0).detach()

    def outputs(is_cached):
        module, outs = made(field), []
        for first in (True, False):
            step = step_context(first_microbatch=first if is_cached else None)
            with step, fp8("delayed"), torch.no_grad():
                outs.append(call(module, field, inp).float())
            changed_by_fused_adamw(module)
        return outs

    plain = outputs(False)
    with patch_te():
        cached = outputs(True)
    for one, other in zip(plain, cached, strict=True):
        assert (one - other).norm() <= DELAYED_BOUND * one.norm()
    assert (cached[0] - cached[1]).norm() > DELAYED_BOUND * cached[0].norm()


@exact_recipes
@stepping
def test_a_run_that_is_resumed_in_the_middle_of_a_step_uses_the_loaded_weight(made, field, recipe):
    saved, module, inp = made(field), made(field), example(field, 0).detach()
    changed_in_place(saved)
    with patch_te(), torch.no_grad():
        with step_context(first_microbatch=True), fp8(recipe):
            call(module, field, inp)
        module.load_state_dict(copy.deepcopy(saved.state_dict()))
        with step_context(first_microbatch=False), fp8(recipe):
            later = call(module, field, inp)
        with fp8(recipe):
            assert same(later, call(saved, field, inp))


@exact_recipes
@pytest.mark.parametrize("field", ["linear", "layer_norm_mlp"])
def test_generation_inside_a_training_scope_uses_the_weight_as_it_is(made, field, recipe):
    module, prompt = made(field), example(field, 9).detach()
    with patch_te():
        for step, inp in accumulate([example(field, seed) for seed in range(2)], 2):
            with step_context(step), fp8(recipe):
                call(module, field, inp).float().square().sum().backward()
                with torch.no_grad():
                    found = [call(module, field, prompt) for _ in range(2)]
                    fresh = call(module, field, prompt, **NOT_CACHED)
                assert differing(found, [fresh, fresh]) == []
            if step.optim_step:
                changed_by_fused_adamw(module)
        with step_context(first_microbatch=False), fp8(recipe), torch.no_grad():
            found, fresh = (call(module, field, prompt, **given) for given in ({}, NOT_CACHED))
        assert same(found, fresh)


@exact_recipes
def test_on_stale_raise_names_the_weight(made, recipe):
    module, inp = made("linear"), example("linear", 0)
    with patch_te(on_stale="raise"):
        with step_context(first_microbatch=True), fp8(recipe):
            module(inp)
        changed_by_fused_adamw(module)
        error = pytest.raises(StaleWeightError, match="weight")
        with step_context(first_microbatch=False), fp8(recipe), error:
            module(inp)


def test_another_recipe_of_the_same_type_makes_the_weights_anew(made):
    from transformer_engine.common.recipe import Float8CurrentScaling, Format

    module, inp = made("linear"), example("linear", 0).detach()
    recipes = [Float8CurrentScaling(), Float8CurrentScaling(fp8_format=Format.E4M3)]
    with patch_te(), torch.no_grad():
        for first, recipe in zip((True, False), recipes, strict=True):
            with step_context(first_microbatch=first), TEFp8Config(recipe).autocast():
                module(inp)
        assert cache_counts(module).refreshed == 1


@pytest.mark.parametrize("scope", [True, False, None])
@exact_recipes
@stepping
def test_validation_in_training_is_that_of_a_fresh_copy(made, field, recipe, scope):
    module, twin, held_out = made(field), made(field), example(field, 99).detach()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05, fused=True)

    def validated(model, first):
        with step_context(first_microbatch=first), fp8(recipe), torch.no_grad():
            return call(model, field, held_out)

    with patch_te():
        for step, inp in accumulate([example(field, seed) for seed in range(4)], 2):
            with step_context(step), fp8(recipe):
                call(module, field, inp).float().square().sum().backward()
            twin.load_state_dict(copy.deepcopy(module.state_dict()))
            assert same(validated(module, scope), validated(twin, None))
            if step.optim_step:
                optimizer.step()
                optimizer.zero_grad()
                twin.load_state_dict(copy.deepcopy(module.state_dict()))
                assert same(validated(module, scope), validated(twin, None))


@exact_recipes
@pytest.mark.parametrize("field", ["linear", "layer_norm_mlp"])
def test_validation_before_the_training_forward_changes_no_gradient(made, field, recipe):
    def gradients(validates):
        module = made(field)
        with step_context(first_microbatch=True), fp8(recipe):
            if validates:
                with torch.no_grad():
                    call(module, field, example(field, 9).detach())
            call(module, field, example(field, 0)).float().square().sum().backward()
        return [parameter.grad for parameter in module.parameters()]

    with patch_te():
        assert differing(gradients(True), gradients(False)) == []


@pytest.mark.parametrize("num_calls", [1, 2])
def test_fused_accumulation_loses_no_gradient(classes, num_calls):
    def main_grad(is_cached):
        torch.manual_seed(0)
        layer = classes.linear(
            IN, OUT, bias=False, params_dtype=torch.bfloat16, fuse_wgrad_accumulation=True
        )
        layer.weight.main_grad = torch.zeros(OUT, IN, device="cuda")
        for step, inp in accumulate([example("linear", seed) for seed in range(3)], 3):
            first = step.first_microbatch if is_cached else None
            with step_context(first_microbatch=first), fp8("current"):
                outs = [layer(scale * inp) for scale in range(1, num_calls + 1)]
                sum(out.float().square().sum() for out in outs).backward()
        return layer.weight.main_grad

    with patch_te():
        assert torch.equal(main_grad(True), main_grad(False))


def test_a_graph_of_cached_weights_wants_the_bool_at_replay(made):
    import transformer_engine.pytorch as te

    module, inp = made("linear"), example("linear", 0)
    recipe = TEFp8Config("current").build_recipe()
    with patch_te():
        graphed = te.make_graphed_callables(
            module,
            (torch.randn_like(inp).requires_grad_(),),
            fp8_enabled=True,
            fp8_recipe=recipe,
            fp8_weight_caching=True,
        )
        with step_context(first_microbatch=True), fp8("current"):
            with pytest.raises(ValueError, match="is_first_microbatch"):
                graphed(inp)
            first = graphed(inp, is_first_microbatch=current_step().first_microbatch).clone()
        with step_context(first_microbatch=False), fp8("current"):
            later = graphed(inp, is_first_microbatch=current_step().first_microbatch).clone()
    assert same(first.detach(), later.detach())


def test_compiled_code_gives_the_same_in_every_step(made):
    module, inp = made("linear"), example("linear", 0).detach()
    compiled = torch.compile(lambda x: module(x))
    outs = []
    with patch_te(), torch.no_grad():
        for first in (None, True, False):
            with step_context(first_microbatch=first), fp8("current"):
                outs.append(compiled(inp))
    assert all(same(out, outs[0]) for out in outs)
