import asyncio
import copy
import io
from functools import partial

import attrs
import pytest
import torch
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from automodel_fn import (
    CacheCounts,
    ConfigError,
    StaleWeightError,
    accumulate,
    apply,
    bf16,
    bind,
    cache_counts,
    cast_plan,
    invalidate,
    step_context,
)
from automodel_fn.step._ambient import eager_step
from automodel_fn.te._aware import step_aware
from automodel_fn.te._patch import patch_classes

STEPPING = (
    "linear",
    "grouped_linear",
    "layer_norm_linear",
    "layer_norm_mlp",
    "multihead_attention",
    "transformer_layer",
)
stepping = pytest.mark.parametrize("field", STEPPING)
both_modes = pytest.mark.parametrize("use_reentrant", [True, False])


@pytest.fixture
def layer(patched, made):
    return made(patched, "linear")


@pytest.fixture
def x():
    return torch.linspace(-1, 1, 8).view(2, 4)


def run(layer, first, x):
    with step_context(first_microbatch=first):
        return layer(x)


def uncached(layer, x):
    return layer(x, is_first_microbatch=None)


def weights(module):
    return [p for p in module.parameters() if p.dim() > 1]


def halved(state):
    return {name: tensor / 2 for name, tensor in state.items()}


def optimizer_step(kind, **options):
    def change(module):
        module(torch.ones(2, 4)).sum().backward()
        kind(module.parameters(), lr=0.5, **options).step()

    return change


def assigned_data(module):
    module.weight.data = module.weight.detach() / 2


def replaced(module):
    module.weight = torch.nn.Parameter(module.weight.detach() / 2)


def hidden(module):
    module.weight.data.add_(1)
    invalidate(module)


CHANGES = {
    "in place": lambda module: module.weight.detach().mul_(0.5),
    "an optimizer step": optimizer_step(torch.optim.SGD),
    "a fused optimizer step": optimizer_step(torch.optim.AdamW, fused=True),
    "a foreach optimizer step": optimizer_step(torch.optim.AdamW, foreach=True),
    "another storage": assigned_data,
    "another parameter": replaced,
    "load_state_dict": lambda module: module.load_state_dict(halved(module.state_dict())),
    "load_state_dict(assign=True)": lambda module: module.load_state_dict(
        halved(module.state_dict()), assign=True
    ),
    "what invalidate tells": hidden,
    "our cast": lambda module: apply(cast_plan(module, bf16)),
    "module.to": lambda module: module.to(bf16),
}
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


@changes
def test_a_later_microbatch_uses_the_weight_as_it_is_and_counts_the_refresh(layer, x, change):
    for first in (True, False):
        run(layer, first, x)
    assert cache_counts(layer) == CacheCounts(filled=1, reused=1)
    change(layer)
    x = x.to(layer.weight.dtype)
    for _ in range(2):
        assert torch.equal(run(layer, False, x), uncached(layer, x))
    assert cache_counts(layer) == CacheCounts(filled=1, reused=2, refreshed=1)


@changes
def test_on_stale_raise_makes_each_change_an_error_that_names_the_weight(classes, made, x, change):
    with patch_classes(classes, eager_step, on_stale="raise"):
        layer = made(classes, "linear")
        run(layer, True, x)
        run(layer, False, x)
        change(layer)
        x = x.to(layer.weight.dtype)
        with pytest.raises(StaleWeightError, match=r"Linear keeps .* changed: weight\."):
            run(layer, False, x)
        assert torch.equal(run(layer, True, x), uncached(layer, x))
        assert cache_counts(layer).refreshed == 0


def test_the_error_is_raised_while_some_handle_wants_it(classes, made, x):
    with patch_classes(classes, eager_step):
        layer = made(classes, "linear")
        strict = patch_classes(classes, eager_step, on_stale="raise")
        assert strict.on_stale == "raise"
        run(layer, True, x)
        layer.weight.detach().mul_(0.5)
        with pytest.raises(StaleWeightError):
            run(layer, False, x)
        strict.remove()
        assert torch.equal(run(layer, False, x), uncached(layer, x))


def test_another_word_for_on_stale_is_an_error_and_nothing_is_patched(classes, class_dicts):
    before = class_dicts(classes)
    with pytest.raises(ConfigError, match="on_stale='ignore' must be 'refresh' or 'raise'"):
        patch_classes(classes, eager_step, on_stale="ignore")
    assert class_dicts(classes) == before


def test_a_cast_that_was_undone_is_no_change_and_one_used_in_between_is(layer, x):
    run(layer, True, x)
    apply(cast_plan(layer, bf16), keep_originals=True).undo()
    run(layer, False, x)
    assert cache_counts(layer) == CacheCounts(filled=1, reused=1)
    report = apply(cast_plan(layer, bf16), keep_originals=True)
    run(layer, False, x.bfloat16())
    report.undo()
    assert torch.equal(run(layer, False, x), uncached(layer, x))
    assert cache_counts(layer) == CacheCounts(filled=1, reused=1, refreshed=2)


@stepping
def test_each_weight_of_each_class_is_looked_at(patched, made, called, example, field):
    module, inp = made(patched, field), example(field)
    with step_context(first_microbatch=True):
        called(module, field, inp)
    names = [name for name, p in module.named_parameters() if p.dim() > 1]
    for number, name in enumerate(names, 1):
        with torch.no_grad():
            module.get_parameter(name).mul_(-2)
        with step_context(first_microbatch=False):
            out = called(module, field, inp)
        assert torch.equal(out, called(module, field, inp, is_first_microbatch=None)), name
        assert cache_counts(module).refreshed == number


def test_a_part_that_is_replaced_is_looked_at(patched, made, example):
    layer, inp = made(patched, "transformer_layer"), example("transformer_layer")
    part = made(patched, "layer_norm_mlp")
    for module in (layer, part):
        run(module, True, inp)
    with torch.no_grad():
        part.fc1_weight.mul_(-2)
    layer.layernorm_mlp = part
    assert torch.equal(run(layer, False, inp), uncached(layer, inp))


def test_a_weight_that_comes_to_be_parametrized_is_looked_at(layer, x):
    run(layer, True, x)
    parametrize.register_parametrization(layer, "weight", torch.nn.Tanh())
    for first in (False, True, False):
        assert torch.equal(run(layer, first, x), uncached(layer, x))
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(2)
    assert torch.equal(run(layer, False, x), uncached(layer, x))
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(run(layer, False, x), uncached(layer, x))
    assert cache_counts(layer) == CacheCounts(filled=3, reused=1, refreshed=2)


def test_fewer_rows_of_the_same_storage_are_another_weight(classes, x):
    with patch_classes(classes, eager_step):
        layer = classes.linear(4, 6, bias=False)
        run(layer, True, x)
        layer.weight.data = layer.weight.data[:2]
        assert torch.equal(run(layer, False, x), uncached(layer, x))


@attrs.frozen
class Recipe:
    name: str


def test_a_new_recipe_is_noticed_and_an_equal_one_is_none(classes, made, x):
    recipe = [Recipe("current")]
    with patch_classes(classes, eager_step, lambda: recipe[0]):
        layer = made(classes, "linear")
        run(layer, True, x)
        recipe[0] = Recipe("current")
        run(layer, False, x)
        assert cache_counts(layer) == CacheCounts(filled=1, reused=1)
        recipe[0] = Recipe("block")
        run(layer, False, x)
        assert cache_counts(layer) == CacheCounts(filled=1, reused=1, refreshed=1)
        assert layer.num_quantizations == 2


def test_without_a_recipe_the_step_is_passed_on_and_nothing_is_counted(classes, made, x):
    with patch_classes(classes, eager_step, lambda: None):
        layer = made(classes, "linear")
        run(layer, True, x)
        layer.weight.detach().mul_(2)
        run(layer, False, x)
    assert cache_counts(layer) == CacheCounts()


# Called twice.


def test_the_second_call_in_a_first_microbatch_reuses_what_the_first_made(layer, x):
    with step_context(first_microbatch=True):
        outs = [layer(x), layer(x)]
        with step_context(optim_step=True):
            outs.append(layer(x))
        outs.append(bind(layer)(x))
    assert layer.num_quantizations == 1
    assert cache_counts(layer) == CacheCounts(filled=1, repeated=3)
    assert all(torch.equal(out, uncached(layer, x)) for out in outs)


def test_each_first_microbatch_makes_it_anew(layer, x):
    for _ in range(3):
        run(layer, True, x)
    scope = step_context(first_microbatch=True)
    for _ in range(2):
        with scope:
            layer(x)
    with step_context(first_microbatch=True):
        layer(x)
        run(layer, True, x)
    assert cache_counts(layer) == CacheCounts(filled=7)


def test_the_second_call_uses_a_weight_that_changed_in_between_as_it_is(layer, x):
    with step_context(first_microbatch=True):
        layer(x)
        layer.weight.detach().mul_(0.5)
        assert torch.equal(layer(x), uncached(layer, x))
    assert cache_counts(layer) == CacheCounts(filled=1, refreshed=1)


@both_modes
def test_a_recompute_is_not_a_second_call(layer, x, use_reentrant):
    inp = x.clone().requires_grad_()
    with step_context(first_microbatch=True):
        checkpoint(layer, inp, use_reentrant=use_reentrant).sum().backward()
    assert cache_counts(layer) == CacheCounts(filled=2)
    assert torch.equal(run(layer, False, x), uncached(layer, x))
    assert cache_counts(layer) == CacheCounts(filled=2, reused=1)


@both_modes
def test_checkpointed_microbatches_quantize_once_and_in_the_recompute_of_the_first(
    layer, x, use_reentrant
):
    for step, batch in accumulate([x.clone().requires_grad_() for _ in range(4)], 4):
        with step_context(step):
            checkpoint(layer, batch, use_reentrant=use_reentrant).sum().backward()
    assert layer.num_quantizations == 2
    assert cache_counts(layer) == CacheCounts(filled=2, reused=6)


def test_microbatches_of_two_tasks_are_told_apart(layer, x):
    async def work():
        with step_context(first_microbatch=True):
            await asyncio.sleep(0)
            layer(x)
            await asyncio.sleep(0)

    async def together():
        await asyncio.gather(work(), work())

    asyncio.run(together())
    assert cache_counts(layer) == CacheCounts(filled=2)


# Gradients that are accumulated by the module itself.


def fused(classes):
    """A Linear that adds its weight's gradient to `main_grad`, by Transformer Engine's rule."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, layer, first):
            ctx.save_for_backward(x)
            ctx.layer, ctx.first = layer, first
            return x @ layer.quantized("weight", first, x.dtype).detach().t()

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            main_grad = ctx.layer.weight.main_grad
            added = grad.t() @ x
            if ctx.first:
                main_grad.copy_(added)
            else:
                main_grad.add_(added)
            return None, None, None, None

    class Fused(classes.linear):
        fuse_wgrad_accumulation = True

        def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
            return Product.apply(inp, self.weight, self, is_first_microbatch)

    layer_class = attrs.evolve(classes, linear=Fused)
    with torch.no_grad():
        layer = Fused(4, 6, bias=False)
    layer.weight.main_grad = torch.zeros(6, 4)
    return layer_class, layer


@pytest.mark.parametrize("num_calls", [1, 2, 3])
def test_a_module_that_adds_its_own_gradients_loses_none_and_is_quantized_once(
    classes, x, num_calls
):
    record, layer = fused(classes)
    with patch_classes(record, eager_step):
        for step, batch in accumulate([x, 2 * x], 2):
            with step_context(step):
                sum(layer(scale * batch).sum() for scale in range(1, num_calls + 1)).backward()
    total = sum(range(1, num_calls + 1)) * 3 * x.sum(0)
    torch.testing.assert_close(layer.weight.main_grad, total.expand(6, 4))
    assert layer.num_quantizations == 1
    assert cache_counts(layer).filled == 1


def test_a_refresh_never_overwrites_gradients(classes, x):
    record, layer = fused(classes)
    with patch_classes(record, eager_step):
        with step_context(first_microbatch=True):
            layer(x).sum().backward()
        layer.weight.detach().mul_(0.5)
        with step_context(first_microbatch=False):
            layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.main_grad, (2 * x.sum(0)).expand(6, 4))
    assert cache_counts(layer) == CacheCounts(filled=1, refreshed=1)


def test_the_caller_may_still_ask_to_overwrite(classes, x):
    record, layer = fused(classes)
    layer.weight.main_grad.fill_(7)
    with patch_classes(record, eager_step), step_context(first_microbatch=True):
        layer(x, is_first_microbatch=True).sum().backward()
    torch.testing.assert_close(layer.weight.main_grad, x.sum(0).expand(6, 4))


# Evaluation, generation, resuming.


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("is_after_a_step", [True, False])
def test_generation_inside_a_training_scope_uses_the_weight_as_it_is(
    layer, x, first, is_after_a_step
):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    with step_context(first_microbatch=True):
        layer(x).sum().backward()
    with step_context(first_microbatch=first):
        layer(x).sum().backward()
        if is_after_a_step:
            optimizer.step()
        tokens = x[:1]
        with torch.no_grad():
            for _ in range(3):
                out = layer(tokens)
                assert torch.equal(out, uncached(layer, tokens))
                tokens = torch.cat([tokens, out[-1:, :4]])
    assert cache_counts(layer).refreshed == is_after_a_step


@pytest.mark.parametrize("scope", [True, False, None, "outside"])
def test_evaluation_anywhere_computes_what_a_fresh_copy_does(layer, x, scope):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)

    def evaluated():
        layer.eval()
        with torch.no_grad():
            out = layer(x) if scope == "outside" else run(layer, scope, x)
        layer.train()
        return out

    for step, batch in accumulate([x, -x, 2 * x, x], 2):
        with step_context(step):
            layer(batch).square().sum().backward()
        assert torch.equal(evaluated(), uncached(copy.deepcopy(layer), x))
        if step.optim_step:
            optimizer.step()
            optimizer.zero_grad()
            assert torch.equal(evaluated(), uncached(copy.deepcopy(layer), x))


def test_evaluation_inside_a_training_scope_changes_no_gradient(classes, made, x):
    def gradients(evaluates):
        layer = made(classes, "linear")
        for step, batch in accumulate([x, -x, 2 * x], 3):
            with step_context(step):
                if evaluates:
                    with torch.no_grad():
                        layer(3 * x)
                layer(batch).square().sum().backward()
        return layer.weight.grad

    with patch_classes(classes, eager_step):
        assert torch.equal(gradients(True), gradients(False))


def test_generation_after_an_abandoned_step_and_a_new_step_use_the_weight_as_it_is(layer, x):
    run(layer, True, x)  # one of four microbatches, and then an error in the data
    layer.weight.detach().mul_(0.5)
    assert torch.equal(layer(x), uncached(layer, x))
    for step, batch in accumulate([x, -x], 2):
        with step_context(step):
            assert torch.equal(layer(batch), uncached(layer, batch))


@pytest.mark.parametrize("first", [True, False])
def test_a_run_that_is_resumed_in_the_middle_of_a_step_uses_the_loaded_weight(
    patched, made, x, first
):
    before = made(patched, "linear")
    with torch.no_grad():
        before.weight.mul_(-3)
    saved = io.BytesIO()
    torch.save(before.state_dict(), saved)
    saved.seek(0)
    layer = made(patched, "linear")
    run(layer, True, x)
    layer.load_state_dict(torch.load(saved))
    assert torch.equal(run(layer, first, x), uncached(before, x))


def test_a_copy_knows_nothing_of_the_original_and_uses_its_own_weight(layer, x):
    run(layer, True, x)
    for copied in (copy.deepcopy(layer), _saved_and_loaded(layer)):
        with torch.no_grad():
            copied.weight.mul_(-2)
        assert torch.equal(run(copied, False, x), uncached(copied, x))
        assert cache_counts(copied) == CacheCounts(filled=1)
    assert cache_counts(layer) == CacheCounts(filled=1)


def _saved_and_loaded(layer):
    twin = type(layer)(4, 6)
    twin.load_state_dict(layer.state_dict())
    return twin


def test_zero_microbatches_run_nothing_and_the_next_step_is_a_first_one(layer, x):
    assert list(accumulate([], 4)) == []
    for step, batch in accumulate([x], 4):
        assert (step.first_microbatch, step.optim_step) == (True, True)
        with step_context(step):
            layer(batch)
    assert cache_counts(layer) == CacheCounts(filled=1)


def test_after_a_partial_last_step_the_next_epoch_makes_the_weights_anew(layer, x):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        for step, batch in accumulate([x] * 5, 3):
            with step_context(step):
                out = layer(batch)
                assert torch.equal(out, uncached(layer, batch))
                out.sum().backward()
            if step.optim_step:
                optimizer.step()
    assert cache_counts(layer) == CacheCounts(filled=4, reused=6)


# What goes wrong.


def test_after_a_forward_that_failed_the_weights_are_made_anew(layer, x):
    run(layer, True, x)
    layer.weight.detach().mul_(0.5)
    with pytest.raises(AttributeError):  # before anything was quantized
        run(layer, True, None)
    assert torch.equal(run(layer, False, x), uncached(layer, x))


def test_what_a_caller_filled_by_its_own_argument_is_not_trusted(layer, x):
    layer(x, is_first_microbatch=True)
    layer.weight.detach().mul_(0.5)
    assert torch.equal(run(layer, False, x), uncached(layer, x))


def test_a_module_that_a_graph_replays_is_run_without_caching_where_it_would_be_changed(layer, x):
    run(layer, True, x)
    kept = dict(layer._fp8_workspaces)
    layer.forward = partial(type(layer).forward, layer)  # as make_graphed_callables leaves it
    layer.weight.detach().mul_(0.5)
    assert torch.equal(run(layer, False, x), uncached(layer, x))
    assert all(layer._fp8_workspaces[name] is tensor for name, tensor in kept.items())


def test_while_a_graph_is_recorded_what_is_kept_stays_where_it_is(layer, x, monkeypatch):
    run(layer, True, x)
    kept = dict(layer._fp8_workspaces)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    layer.weight.detach().mul_(0.5)
    assert torch.equal(run(layer, False, x), uncached(layer, x))
    assert all(layer._fp8_workspaces[name] is tensor for name, tensor in kept.items())


def test_a_weight_of_two_modules_is_looked_at_by_both(patched, made, x):
    one, other = made(patched, "linear"), made(patched, "linear")
    other.weight = one.weight
    for module in (one, other):
        run(module, True, x)
    one.weight.detach().mul_(0.5)
    for module in (one, other):
        assert torch.equal(run(module, False, x), uncached(module, x))
        assert cache_counts(module).refreshed == 1


def test_the_old_weight_is_not_kept_alive(layer, x):
    run(layer, True, x)
    storage = torch.multiprocessing.reductions.StorageWeakRef(layer.weight.untyped_storage())
    layer.weight = torch.nn.Parameter(torch.ones(6, 4))
    layer._fp8_workspaces.clear()
    assert storage.expired()


def test_a_built_module_looks_at_its_weight_too(classes, x):
    layer = step_aware(classes.linear, "linear")(4, 6)
    run(layer, True, x)
    layer.weight.detach().mul_(0.5)
    assert torch.equal(run(layer, False, x), uncached(layer, x))
    assert cache_counts(torch.nn.Sequential(layer)) == CacheCounts(filled=1, refreshed=1)
