import copy
import pickle
from functools import partial

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)

from automodel_fn import (
    ConfigError,
    StepContext,
    carry_step,
    checkpoint_context_fn,
    current_step,
    step_context,
)

OFF, FIRST, LATER = StepContext(), StepContext(True), StepContext(False)
LAST = StepContext(False, optim_step=True)

both_modes = pytest.mark.parametrize("use_reentrant", [True, False])
pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"
)


@pytest.fixture
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False)).train()


def losses(model, steps):
    seen, found = [], []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda *_: seen.append(current_step()))
        for layer in model.model.layers
    ]
    tokens = torch.arange(6).view(1, 6)
    for step in steps:
        with step_context(step):
            found.append(model(tokens, labels=tokens).loss)
    return seen, found, hooks


def backward_in_a_thread_with_scopes(in_thread, found):
    def work():
        with step_context(LAST):
            torch.ones(1, requires_grad=True).sin()
        with step_context(LAST):
            for loss in found:
                loss.backward()

    in_thread(work)


@both_modes
def test_every_recompute_sees_its_forwards_step_in_a_thread_with_scopes_of_its_own(
    model, in_thread, use_reentrant
):
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    carry_step(model)
    seen, found, _ = losses(model, (FIRST, LATER))
    backward_in_a_thread_with_scopes(in_thread, found)
    assert seen == ([FIRST] * 2 + [LATER] * 2) * 2


@both_modes
def test_without_it_such_a_thread_sees_another_step(model, in_thread, use_reentrant):
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with step_context(LATER):
        torch.ones(1, requires_grad=True).sin()
    seen, found, _ = losses(model, (FIRST, LATER))
    backward_in_a_thread_with_scopes(in_thread, found)
    assert seen[:4] == [FIRST] * 2 + [LATER] * 2
    assert set(seen[4:]) <= {LAST, OFF}


@both_modes
def test_it_changes_no_gradient_and_no_name(model, use_reentrant):
    twin = copy.deepcopy(model)
    names = list(model.state_dict())
    for one in (model, twin):
        one.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with carry_step(model):
        for one in (model, twin):
            _, (loss,), _ = losses(one, (FIRST,))
            loss.backward()
    assert list(model.state_dict()) == names
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad.view(torch.int32), other.grad.view(torch.int32))


def test_removed_it_leaves_the_functions_that_were_there(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    before = [layer._gradient_checkpointing_func for layer in model.model.layers]
    handle = carry_step(model)
    during = [layer._gradient_checkpointing_func for layer in model.model.layers]
    assert all(one is not other for one, other in zip(before, during, strict=True))
    handle.remove()
    handle.remove()
    after = [layer._gradient_checkpointing_func for layer in model.model.layers]
    assert all(one is other for one, other in zip(before, after, strict=True))


def test_removed_it_leaves_alone_what_was_enabled_since(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with carry_step(model):
        model.gradient_checkpointing_enable({"use_reentrant": True})
        newer = [layer._gradient_checkpointing_func for layer in model.model.layers]
    left = [layer._gradient_checkpointing_func for layer in model.model.layers]
    assert all(one is other for one, other in zip(newer, left, strict=True))


def test_a_model_that_carries_the_step_can_be_copied_and_pickled(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # a hook that cannot be pickled
    carry_step(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        seen, (loss,), _ = losses(other, (FIRST,))
        loss.backward()
        assert seen == [FIRST] * 4


def test_a_model_without_checkpointing_is_an_error_and_is_not_changed(model):
    before = [set(vars(module)) for module in model.modules()]
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no module that is checkpointed"):
        carry_step(model)
    assert [set(vars(module)) for module in model.modules()] == before


class Seeing(torch.nn.Linear):
    def __init__(self, seen):
        super().__init__(2, 2)
        self.seen = seen

    def forward(self, x):
        self.seen.append(current_step())
        return super().forward(x).sin()


@pytest.mark.parametrize("carried", [True, False])
def test_torchs_checkpoint_wrapper_carries_it_with_the_context_fn(in_thread, carried):
    seen = []
    options = {"context_fn": checkpoint_context_fn} if carried else {}
    wrap = partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT, **options)
    layer = wrap(Seeing(seen))
    outs = []
    for step in (FIRST, LATER):
        with step_context(step):
            outs.append(layer(torch.ones(1, 2, requires_grad=True)).sum())
    backward_in_a_thread_with_scopes(in_thread, outs)
    assert seen[:2] == [FIRST, LATER]
    assert (seen[2:] == [FIRST, LATER]) is carried
