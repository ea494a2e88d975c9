import copy
import pickle

import attrs
import pytest
import torch
import transformers
from convert_families import OWN, batch_of, small_model
from torch import nn

from automodel_fn import ConfigError, apply, backend_plan, lm_head_logits
from automodel_fn.nn import LMHead
from automodel_fn.ops import lm_head_loss

PRECISIONS = ("fp32", "bf16x3", "bf16")


def asked(precision, **fields):
    return attrs.evolve(OWN, lm_head_precision=precision, **fields)


def entry(model, backend, **options):
    plan = backend_plan(model, backend, **options)
    (found,) = (each for each in plan.entries if each.field == "lm_head_precision")
    return found


def body(model, batch):
    return model.model(**{name: batch[name] for name in batch if name != "labels"})[0]


@pytest.fixture
def llama():
    """bf16 everywhere but in the head, as a model is trained whose logits are to be exact."""
    model = small_model("llama", dtype=torch.bfloat16)
    model.lm_head.float()
    nn.init.normal_(model.lm_head.weight, std=0.2)
    return model


@pytest.mark.parametrize("precision", PRECISIONS)
def test_logits_have_the_bits_that_lm_head_logits_makes_of_the_own_head(llama, precision):
    batch = batch_of("llama")
    del batch["labels"]
    expected = lm_head_logits(llama.lm_head, body(llama, batch), precision=precision).logits
    apply(backend_plan(llama, asked(precision)))
    found = llama(**batch).logits

    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_fused_loss_multiplies_in_that_precision(llama, precision):
    batch = batch_of("llama")
    expected = lm_head_loss(
        body(llama, batch), llama.lm_head.weight, batch["labels"], shift=True, precision=precision
    ).loss
    apply(backend_plan(llama, asked(precision, loss="fused")))
    output = llama(**batch)

    assert output.logits is None
    assert torch.equal(output.loss, expected)


def test_a_loss_in_bf16_is_another_one_than_that_in_fp32(llama):
    batch, losses = batch_of("llama"), []
    for precision in ("bf16", "fp32"):
        report = apply(backend_plan(llama, asked(precision, loss="fused")))
        losses.append(llama(**batch).loss)
        report.undo()

    assert losses[0] != losses[1]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)


def test_a_tied_weight_stays_one_parameter_in_its_own_dtype():
    model = small_model("qwen3", dtype=torch.bfloat16)
    embedding, weight = model.model.embed_tokens, model.model.embed_tokens.weight
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = apply(backend_plan(model, asked("fp32", loss="fused")))
    model(**batch_of("qwen3")).loss.backward()

    assert model.lm_head.weight is model.model.embed_tokens.weight is weight
    assert weight.dtype == weight.grad.dtype == torch.bfloat16
    assert type(embedding) is nn.Embedding
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    report.undo()
    assert type(model.lm_head) is nn.Linear


def test_a_head_is_given_back_as_it_was(llama, state):
    before = state(llama)
    report = apply(backend_plan(llama, asked("bf16x3", loss="fused")))
    assert isinstance(llama.lm_head, LMHead)
    assert llama.lm_head.precision == "bf16x3"
    report.undo()

    assert state(llama) == before


def test_a_precision_is_exchanged_for_another_one(llama):
    apply(backend_plan(llama, asked("bf16")))
    plan = backend_plan(llama, asked("fp32"))
    apply(plan)
    assert llama.lm_head.precision == "fp32"
    apply(plan.inverse())

    assert llama.lm_head.precision == "bf16"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_makes_the_same_logits(llama, copied):
    batch = batch_of("llama")
    del batch["labels"]
    apply(backend_plan(llama, asked("bf16x3")))

    assert torch.equal(copied(llama)(**batch).logits, llama(**batch).logits)


def test_what_is_saved_is_what_plain_transformers_reads(llama, tmp_path):
    apply(backend_plan(llama, asked("fp32")))
    llama.save_pretrained(tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)

    assert type(read.lm_head) is nn.Linear
    for name, value in read.state_dict().items():
        assert torch.equal(value, llama.state_dict()[name].bfloat16())


def test_gradients_of_a_head_in_float32_are_those_of_the_head_cast_up(llama):
    batch = batch_of("llama")
    llama.lm_head.bfloat16()
    wide = copy.deepcopy(llama)
    wide.lm_head.float()
    wide.lm_head.register_forward_pre_hook(lambda _, given: (given[0].float(),))
    apply(backend_plan(llama, asked("fp32")))
    for model in (llama, wide):
        model(**batch).loss.backward()

    found = llama.lm_head.weight.grad
    assert torch.equal(found, wide.lm_head.weight.grad.bfloat16())


def test_nothing_asked_leaves_the_head_and_is_not_listed(llama):
    plan = backend_plan(llama, asked(None))

    assert "lm_head_precision" not in {each.field for each in plan.entries}


def test_an_entry_says_what_comes_out_and_what_goes_in(llama):
    assert entry(llama, asked("bf16x3")).reason == (
        "as asked: its logits are float32; all but fp32 takes bf16 hidden states"
    )


def test_float32_hidden_states_are_an_error_that_names_the_way_out():
    model = small_model("llama")
    apply(backend_plan(model, asked("bf16x3")))
    with pytest.raises(ConfigError, match=r"takes bf16: cast them, or use precision='fp32'"):
        model(**batch_of("llama"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_family_that_widens_its_logits_gives_the_loss_its_hidden_states(precision):
    """Mamba does, and the loss is to multiply what its head is given."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=96)
    model = transformers.MambaForCausalLM(config).bfloat16().train()
    ids, losses = batch_of("llama")["input_ids"], []
    for loss in ("torch", "fused"):
        apply(backend_plan(model, asked(precision, loss=loss)))
        losses.append(model(input_ids=ids, labels=ids).loss)

    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


class Head(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (Head(32, 96), "it is a Head, and no plain Linear"),
        (LMHead(32, 96, precision="bf16"), "it is an LMHead that was made for bf16; make it with"),
    ],
)
def test_what_no_precision_can_be_given_is_skipped(llama, head, reason):
    llama.lm_head = head
    found = entry(llama, asked("fp32"))

    assert found.action == "skip"
    assert found.reason.startswith(reason)


def test_an_lm_head_of_that_precision_is_kept_and_its_loss_can_be_fused(llama):
    head = llama.lm_head
    batch = batch_of("llama")
    hidden, labels = body(llama, batch), batch["labels"]
    expected = lm_head_loss(hidden, head.weight, labels, shift=True, precision="fp32").loss
    llama.lm_head = LMHead.from_linear(head, precision="fp32")
    backend = asked("fp32", loss="fused")
    found = entry(llama, backend)
    apply(backend_plan(llama, backend))

    assert (found.action, found.reason) == ("keep", "it is an LMHead that was made for fp32")
    assert torch.equal(llama(**batch).loss, expected)


def test_a_skipped_head_stays(llama):
    assert entry(llama, asked("fp32"), skip="lm_head").reason == "skip='lm_head'"


def test_a_model_without_a_head_is_a_note(llama):
    (note,) = backend_plan(llama.model, asked("fp32")).notes

    assert note == "lm_head_precision=fp32 has nothing to act on in this model"


NARROWED = """
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from automodel_fn import BackendConfig, backend_plan

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.lm_head = nn.Linear(16, 16), nn.Linear(16, 32)
    def get_output_embeddings(self):
        return self.lm_head

def found(precision, policy, on_head):
    model = Model()
    if on_head:
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    plan = backend_plan(model, BackendConfig(linear="torch", lm_head_precision=precision))
    (entry,) = (each for each in plan.entries if each.field == "lm_head_precision")
    return entry.action

narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
assert found("bf16x3", narrow, False) == "skip"
assert found("fp32", narrow, False) == "skip"
assert found("bf16", narrow, False) == "swap"
assert found("fp32", narrow, True) == "swap"
assert found("fp32", MixedPrecisionPolicy(), False) == "swap"
assert found("bf16", MixedPrecisionPolicy(output_dtype=torch.bfloat16), False) == "skip"
"""


def test_a_head_whose_weight_fsdp2_rounds_is_skipped(on_two_ranks):
    on_two_ranks(NARROWED)
