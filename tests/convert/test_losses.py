import inspect

import attrs
import pytest
import torch
import transformers
from convert_families import OWN, batch_of, small_model
from torch import nn

from automodel_fn import apply, backend_plan

FUSED = attrs.evolve(OWN, loss="fused")


@pytest.fixture
def llama():
    return small_model("llama")


@pytest.fixture
def fused():
    model = small_model("llama")
    apply(backend_plan(model, FUSED))
    return model


def entries(model, backend=FUSED, **options):
    plan = backend_plan(model, backend, **options)
    return {each.name: each for each in plan.entries if each.field == "loss"}


def test_the_model_and_its_head_are_swapped_together(llama):
    found = entries(llama)

    assert set(found) == {"", "lm_head"}
    assert {each.action for each in found.values()} == {"swap"}


@pytest.mark.parametrize("family", ["llama", "qwen3_vl"])
def test_neither_is_swapped_where_the_head_is_skipped(family):
    found = entries(small_model(family), skip="lm_head")

    assert {each.action for each in found.values()} == {"skip"}
    assert all("skip='lm_head'" in each.reason for each in found.values())


def test_a_head_with_a_bias_gives_it_to_the_loss():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.PhiConfig(**sizes, num_attention_heads=4, vocab_size=96)
    model = transformers.PhiForCausalLM(config).train()
    nn.init.normal_(model.lm_head.bias)
    gradients = []
    for _ in range(2):
        torch.manual_seed(0)
        loss = model(**batch_of("llama")).loss
        gradients.append((loss, *torch.autograd.grad(loss, list(model.lm_head.parameters()))))
        apply(backend_plan(model, FUSED))

    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_forward_that_asks_for_super_is_left_alone():
    class Calling(transformers.LlamaForCausalLM):
        def forward(self, input_ids, labels=None, **kwargs):
            super().eval()
            logits = self.lm_head(self.model(input_ids, **kwargs).last_hidden_state)
            loss = self.loss_function(logits, labels, self.config.vocab_size)
            return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    assert {each.reason for each in entries(Calling(small_model("llama").config)).values()} == {
        "the forward of Calling asks for super()"
    }


def test_no_logits_are_made_in_training(fused, llama):
    batch, shapes = batch_of("llama"), []
    fused.lm_head.register_forward_hook(lambda *found: shapes.append(tuple(found[-1].shape)))
    output = fused(**batch)

    assert output.logits is None
    assert shapes == [()]
    torch.testing.assert_close(output.loss, llama(**batch).loss)


def test_logits_are_made_where_there_are_no_labels_or_nothing_is_trained(fused, llama):
    batch = batch_of("llama")
    labels = batch.pop("labels")

    assert torch.equal(fused(**batch).logits, llama(**batch).logits)
    assert fused(**batch).loss is None
    fused.eval()
    output, expected = fused(**batch, labels=labels), llama.eval()(**batch, labels=labels)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)


def test_who_keeps_some_logits_gets_what_the_own_forward_gives(fused, llama):
    for model in (fused, llama):
        with pytest.raises(ValueError, match="to match target batch_size"):
            model(**batch_of("llama"), logits_to_keep=2)


@pytest.mark.parametrize(
    "options",
    [{"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}, {"ignore_index": 5}],
)
def test_options_of_the_loss_are_heeded(fused, llama, options):
    batch = batch_of("llama")

    torch.testing.assert_close(fused(**batch, **options).loss, llama(**batch, **options).loss)


def test_labels_that_are_shifted_already_are_heeded(fused, llama):
    batch = batch_of("llama")
    shifted = batch["labels"].roll(-1, 1)

    found, expected = (model(**batch, shift_labels=shifted).loss for model in (fused, llama))
    torch.testing.assert_close(found, expected)


def test_a_tuple_has_no_place_for_logits(fused):
    found = fused(**batch_of("llama"), return_dict=False)

    assert isinstance(found, tuple)
    assert found[0].shape == ()
    assert len(found) == len(fused(**batch_of("llama")).to_tuple())


def test_labels_by_position_are_labels(fused, llama):
    batch = batch_of("llama")
    names = list(inspect.signature(llama.forward).parameters)
    given = [batch.get(name) for name in names[: names.index("labels") + 1]]

    assert fused(*given).logits is None
    torch.testing.assert_close(fused(*given).loss, llama(*given).loss)


def test_the_signature_stays_that_of_the_own_forward(fused, llama):
    assert inspect.signature(fused.forward) == inspect.signature(llama.forward)


def test_capped_logits_have_their_loss_too():
    own, fused = (small_model("gemma3", final_logit_softcapping=1.5) for _ in range(2))
    apply(backend_plan(fused, FUSED))
    batch = batch_of("gemma3")

    assert fused(**batch).logits is None
    torch.testing.assert_close(fused(**batch).loss, own(**batch).loss)
    assert fused.config.final_logit_softcapping == 1.5


def test_the_balancing_loss_of_experts_is_added():
    options = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    own, fused = (small_model("mixtral", **options) for _ in range(2))
    apply(backend_plan(fused, FUSED))
    batch = batch_of("mixtral")
    found, expected = fused(**batch), own(**batch)

    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)
    found.loss.backward()


def test_a_tied_head_gets_the_gradient_of_both():
    own, fused = (small_model("qwen3") for _ in range(2))
    apply(backend_plan(fused, FUSED))
    batch = batch_of("qwen3")
    for model in (own, fused):
        model(**batch).loss.backward()

    assert fused.lm_head.weight is fused.model.embed_tokens.weight
    torch.testing.assert_close(fused.lm_head.weight.grad, own.lm_head.weight.grad)


def test_another_loss_is_left_alone(llama):
    def weighted(logits, labels, vocab_size, **kwargs):
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    llama.loss_function = weighted
    assert {each.reason for each in entries(llama).values()} == {
        "its loss is weighted, and not ForCausalLMLoss"
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: torch.tanh(logits),
        lambda logits: logits[..., :-1],
        lambda logits: logits + 1,
        lambda logits: logits.clamp(max=0.1),
        lambda logits: logits.clamp(-50.0, 50.0),
    ],
)
def test_a_model_that_changes_its_logits_is_left_alone(change):
    class Changing(transformers.LlamaForCausalLM):
        def forward(self, input_ids, labels=None, **kwargs):
            hidden_states = self.model(input_ids, **kwargs).last_hidden_state
            logits = change(self.lm_head(hidden_states))
            loss = self.loss_function(logits, labels, logits.shape[-1])
            return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    found = entries(Changing(small_model("llama").config))
    assert {each.action for each in found.values()} == {"skip"}
    assert all("more to its logits than to scale them" in e.reason for e in found.values())


def test_scaled_logits_have_their_loss_too():
    config = transformers.GraniteConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        logits_scaling=3.0,
    )
    own = transformers.GraniteForCausalLM(config).train()
    batch = batch_of("llama")
    expected = own(**batch).loss
    apply(backend_plan(own, FUSED))

    assert own(**batch).logits is None
    torch.testing.assert_close(own(**batch).loss, expected)


@pytest.mark.parametrize("attribute", ["weight", "out_features"])
def test_a_forward_may_look_at_its_head(attribute):
    class Looking(transformers.LlamaForCausalLM):
        def forward(self, input_ids, labels=None, **kwargs):
            hidden_states = self.model(input_ids, **kwargs).last_hidden_state
            getattr(self.lm_head, attribute)
            logits = self.lm_head(hidden_states)
            loss = self.loss_function(logits, labels, self.config.vocab_size)
            return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    model, batch = Looking(small_model("llama").config).train(), batch_of("llama")
    expected = model(**batch).loss
    apply(backend_plan(model, FUSED))

    torch.testing.assert_close(model(**batch).loss, expected)


def test_a_forward_that_can_return_tuples_only_is_left_alone(llama):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head, self.loss_function = nn.Linear(4, 8), llama.loss_function

        def forward(self, x, labels=None):
            logits = self.lm_head(x)
            return (self.loss_function(logits, labels, 8), logits)

    assert {each.reason for each in entries(Plain()).values()} == {
        "the forward of Plain takes no return_dict"
    }


def test_another_head_is_left_alone(llama):
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    llama.lm_head = Scaled(32, 96)
    assert {each.reason for each in entries(llama).values()} == {
        "its head is a Scaled, and no plain Linear"
    }


def test_a_model_with_a_fused_loss_is_compiled_whole(fused):
    batch = batch_of("llama")
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    expected = fused(**batch)
    found = compiled(**batch)

    assert found.logits is None
    torch.testing.assert_close(found.loss, expected.loss)
    found.loss.backward()
