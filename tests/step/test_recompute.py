import gc
import weakref
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from automodel_fn import StepContext, current_step, step_context

OFF = StepContext()
FIRST = StepContext(True)
LATER = StepContext(False)

both_modes = pytest.mark.parametrize("use_reentrant", [True, False])
# The outer one of two reentrant checkpoints runs without gradients, and torch warns of the inner.
without_gradients = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


@both_modes
@pytest.mark.parametrize("step", [FIRST, LATER, StepContext(False, optim_step=True), OFF])
def test_a_recompute_inside_the_scope_sees_its_step(block, leaf, use_reentrant, step):
    with step_context(step):
        checkpoint(block, leaf, use_reentrant=use_reentrant).sum().backward()
    assert block.seen == [step, step]
    torch.testing.assert_close(leaf.grad, leaf.detach().cos())


@both_modes
def test_a_recompute_after_the_scope_was_left_sees_its_step(block, leaf, use_reentrant):
    with step_context(FIRST):
        out = checkpoint(block, leaf, use_reentrant=use_reentrant)
    out.sum().backward()
    assert block.seen == [FIRST, FIRST]
    assert current_step() == OFF


@both_modes
@pytest.mark.parametrize("other", [LATER, OFF])
def test_a_recompute_inside_another_scope_sees_its_own(block, leaf, use_reentrant, other):
    with step_context(FIRST):
        out = checkpoint(block, leaf, use_reentrant=use_reentrant)
    with step_context(other):
        out.sum().backward()
        assert current_step() == other
    assert block.seen == [FIRST, FIRST]


@both_modes
def test_a_forward_outside_of_scopes_is_off_in_a_scoped_backward(block, leaf, use_reentrant):
    out = checkpoint(block, leaf, use_reentrant=use_reentrant)
    with step_context(FIRST):
        out.sum().backward()
    assert block.seen == [OFF, OFF]


@both_modes
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_then_two_backwards_see_their_own(block, leaf, use_reentrant, order):
    outs = []
    for step in (FIRST, LATER):
        with step_context(step):
            outs.append(checkpoint(block, leaf, use_reentrant=use_reentrant))
    for index in order:
        outs[index].sum().backward()
    assert block.seen == [FIRST, LATER, *((FIRST, LATER)[index] for index in order)]


@both_modes
def test_one_forward_one_backward_in_turns(block, leaf, use_reentrant):
    steps = [StepContext(index == 0, optim_step=index == 5) for index in range(6)]
    waiting = []
    for step in steps:
        with step_context(step):
            waiting.append(checkpoint(block, leaf, use_reentrant=use_reentrant))
            if len(waiting) == 3:
                waiting.pop(0).sum().backward()
    for out in waiting:
        out.sum().backward()
    forwards_and_recomputes = [0, 1, 2, 0, 3, 1, 4, 2, 5, 3, 4, 5]
    assert block.seen == [steps[index] for index in forwards_and_recomputes]


@both_modes
def test_a_retained_graph_is_recomputed_twice_alike(block, leaf, use_reentrant):
    with step_context(FIRST):
        out = checkpoint(block, leaf, use_reentrant=use_reentrant)
    with step_context(LATER):
        out.sum().backward(retain_graph=True)
        out.sum().backward()
    assert block.seen == [FIRST, FIRST, FIRST]


@pytest.mark.parametrize("stops_early", [True, False])
def test_a_recompute_sees_its_step_whether_it_stops_early_or_not(leaf, stops_early):
    seen = []

    def block(x):
        seen.append(current_step())
        y = x.sin() + 1  # all that the backward needs is made here
        seen.append(current_step())
        return y

    with set_checkpoint_early_stop(stops_early):
        with step_context(FIRST):
            out = checkpoint(block, leaf, use_reentrant=False)
        with step_context(LATER):
            out.sum().backward()
            assert current_step() == LATER
    assert seen == [FIRST] * (3 if stops_early else 4)


def test_a_recompute_that_stops_early_leaves_the_scopes_of_the_block(leaf):
    def block(x):
        with step_context(optim_step=True):
            y = x.sin()
            ended.append(current_step())
            return y

    ended = []
    with step_context(FIRST):
        out = checkpoint(block, leaf, use_reentrant=False)
    with step_context(LATER):
        out.sum().backward()
        assert current_step() == LATER
    assert len(ended) == 1  # the recompute ended inside the scope
    assert current_step() == OFF


@both_modes
def test_a_scope_entered_in_the_block_stands_in_its_recompute(leaf, use_reentrant):
    seen = []

    def block(x):
        with step_context(optim_step=True):
            seen.append(current_step())
            return x.sin()

    with step_context(FIRST):
        out = checkpoint(block, leaf, use_reentrant=use_reentrant)
    with step_context(LATER):
        out.sum().backward()
        assert current_step() == LATER
    assert seen == [StepContext(True, optim_step=True)] * 2


def nested(block, depth, use_reentrant, x):
    inner = block if depth == 1 else partial(nested, block, depth - 1, use_reentrant)
    block.seen.append(current_step())
    return checkpoint(inner, x.cos(), use_reentrant=use_reentrant)


@pytest.mark.parametrize("depth", [2, 4])
def test_nested_non_reentrant_checkpoints_see_the_forwards_step(block, leaf, depth):
    with step_context(FIRST):
        out = nested(block, depth, False, leaf)
    with step_context(LATER):
        out.sum().backward()
    assert len(block.seen) > 2 * depth
    assert set(block.seen) == {FIRST}


@without_gradients
@pytest.mark.parametrize("depth", [2, 4])
def test_the_inner_part_of_nested_reentrant_checkpoints_is_off(block, leaf, depth):
    with step_context(FIRST):
        out = nested(block, depth, True, leaf)
        forwards = len(block.seen)
    with step_context(LATER):
        out.sum().backward()
    # The outermost recompute runs the part of the next level too, which is begun by no backward.
    recomputed = block.seen[forwards:]
    assert block.seen[:forwards] == [FIRST] * (depth + 1)
    assert recomputed[0] == FIRST
    assert recomputed[-1] == OFF
    assert LATER not in recomputed


@without_gradients
# From 60 nested backwards on autograd moves to threads of a pool.
@pytest.mark.parametrize("depth", [65, 130])
def test_deeply_nested_reentrant_checkpoints_are_off_or_right(block, leaf, depth):
    with step_context(FIRST):
        out = nested(block, depth, True, leaf)
    with step_context(LATER):
        out.sum().backward()
    assert set(block.seen) == {FIRST, OFF}


@both_modes
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_hugging_face_checkpointing_sees_the_forwards_step(use_reentrant):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False)).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    seen = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: seen.append(current_step()))
    tokens = torch.arange(6).view(1, 6)
    losses = []
    for step in (FIRST, LATER):
        with step_context(step):
            losses.append(model(tokens, labels=tokens).loss)
    for loss in losses:
        loss.backward()
    assert seen == [FIRST] * 2 + [LATER] * 2 + [FIRST] * 2 + [LATER] * 2


def test_a_tensor_hook_sees_the_step_of_the_forward_that_made_its_tensor(leaf):
    seen = []
    with step_context(FIRST):
        out = leaf.sin()
        out.register_hook(lambda grad: seen.append(current_step()))
    with step_context(LATER):
        out.sum().backward()
    assert seen == [FIRST]


def test_an_accumulation_hook_sees_the_step_where_backward_was_called(leaf):
    seen = []
    leaf.register_post_accumulate_grad_hook(lambda tensor: seen.append(current_step()))
    with step_context(FIRST):
        outs = [leaf.sin(), leaf.cos()]
    with step_context(LATER):
        outs[0].sum().backward()
    outs[1].sum().backward()
    assert seen == [LATER, OFF]


@both_modes
def test_many_scopes_are_off_or_right_and_the_newest_right(block, use_reentrant):
    leaf = torch.ones(1, requires_grad=True)
    steps = [FIRST, LATER, StepContext(False, optim_step=True)]
    kept = []
    for index in range(10_000):
        with step_context(steps[index % 3]):
            leaf.sin()
            if index % 100 == 0 or index > 9_900:
                kept.append(
                    (steps[index % 3], checkpoint(block, leaf, use_reentrant=use_reentrant))
                )
    block.seen.clear()
    for _, out in kept:
        out.backward()
    pairs = list(zip([step for step, _ in kept], block.seen, strict=True))
    assert all(seen in (step, OFF) for step, seen in pairs)
    assert all(seen == step for step, seen in pairs[-100:])
    assert pairs[0][1] == OFF


@both_modes
def test_many_scopes_without_a_forward_forget_none_with_one(block, leaf, use_reentrant):
    with step_context(FIRST):
        out = checkpoint(block, leaf, use_reentrant=use_reentrant)
    for _ in range(10_000):
        with step_context(LATER):
            pass
    out.sum().backward()
    assert block.seen == [FIRST, FIRST]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_reading_the_step_in_a_recompute_keeps_no_tensor_alive(use_reentrant):
    alive = []

    def block(x):
        y = x.sin()
        current_step()
        alive.append(weakref.ref(y))
        return y.exp()

    gc.collect()
    gc.disable()
    try:
        with step_context(first_microbatch=True):
            x = torch.ones(2, requires_grad=True)
            checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()
        del x
        assert len(alive) == 2
        assert [reference() for reference in alive] == [None, None]
    finally:
        gc.enable()


@both_modes
@pytest.mark.parametrize("is_entered_outside", [True, False])
def test_code_before_a_scope_that_a_checkpointed_function_enters_may_see_it(
    leaf, use_reentrant, is_entered_outside
):
    """What is documented as wrong, and the way around it: enter scopes outside of checkpoints."""
    seen = []

    def inside(x):
        seen.append(current_step())
        with step_context(LATER):
            return x.sin()

    def around(x):
        seen.append(current_step())
        return x.sin()

    with step_context(FIRST):
        if is_entered_outside:
            out = checkpoint(around, leaf, use_reentrant=use_reentrant)
        else:
            out = checkpoint(inside, leaf, use_reentrant=use_reentrant)
    out.sum().backward()
    # Of a reentrant checkpoint one node is made, after the function has run; of the other one the
    # nodes are those of the function, and the recompute works for one that was made in the scope.
    is_wrong = not is_entered_outside and not use_reentrant
    assert seen == [FIRST, LATER if is_wrong else FIRST]
