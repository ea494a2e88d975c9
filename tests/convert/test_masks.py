"""Masks that are made without asking the device whether sequences are packed."""

import attrs
import pytest
import torch
import transformers
from convert_families import OWN, batch_of, small_model
from torch import nn
from transformers import masking_utils

from automodel_fn import apply, backend_plan
from automodel_fn.convert._masks import counts_up

ASYNC = attrs.evolve(OWN, async_masks=True)


@pytest.fixture
def looks(monkeypatch):
    """How often transformers looked whether position ids start anew."""
    found, own = [], masking_utils.find_packed_sequence_indices

    def noted(position_ids):
        found.append(position_ids)
        return own(position_ids)

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", noted)
    return found


def with_async_masks(family):
    model = small_model(family).eval()
    report = apply(backend_plan(model, ASYNC))
    assert report.num_swaps
    return model, report


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mixtral"])
def test_without_position_ids_nobody_looks_and_the_bits_are_the_same(family, looks):
    batch = {"input_ids": batch_of(family)["input_ids"]}
    expected = small_model(family).eval()(**batch, use_cache=False).logits
    assert looks
    looks.clear()
    model, report = with_async_masks(family)
    found = model(**batch, use_cache=False).logits

    assert torch.equal(found, expected)
    assert not looks
    report.undo()
    model(**batch, use_cache=False)
    assert looks


@pytest.mark.parametrize("is_positional", [False, True])
def test_packed_sequences_are_masked_as_before(looks, is_positional):
    ids = batch_of("llama")["input_ids"][:1]
    positions = torch.cat((torch.arange(4), torch.arange(ids.shape[1] - 4)))[None]
    own = small_model("llama").eval()
    expected = own(input_ids=ids, position_ids=positions, use_cache=False).logits
    model, _ = with_async_masks("llama")
    looks.clear()
    if is_positional:
        hidden = model.model(ids, None, positions, use_cache=False).last_hidden_state
        found = model.lm_head(hidden)
    else:
        found = model(input_ids=ids, position_ids=positions, use_cache=False).logits

    assert looks
    assert torch.equal(found, expected)
    assert not torch.equal(found, model(input_ids=ids, use_cache=False).logits)


def test_padding_is_masked_as_before():
    batch = {"input_ids": batch_of("llama")["input_ids"]}
    mask = torch.ones_like(batch["input_ids"])
    mask[:, :3] = 0
    expected = small_model("llama").eval()(**batch, attention_mask=mask).logits
    model, _ = with_async_masks("llama")

    assert torch.equal(model(**batch, attention_mask=mask).logits, expected)


def test_a_cache_is_continued_as_before():
    ids = batch_of("llama")["input_ids"]
    expected = small_model("llama").eval().generate(ids, max_new_tokens=5, do_sample=False)
    model, _ = with_async_masks("llama")

    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)


def test_a_model_that_makes_position_ids_another_way_keeps_its_masks():
    config = transformers.BambaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
    )
    with torch.device("meta"):
        model = transformers.BambaForCausalLM(config)
    (entry,) = [each for each in backend_plan(model, ASYNC).entries if each.field == "async_masks"]

    assert (entry.action, entry.reason) == (
        "skip",
        "its forward makes position ids in a way of its own",
    )


class Counting(nn.Module):
    def forward(self, inputs_embeds, position_ids=None):
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = position_ids.unsqueeze(0)
        return position_ids


class Doubling(nn.Module):
    def forward(self, inputs_embeds, position_ids=None):
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) * 2
            position_ids = position_ids.unsqueeze(0)
        return position_ids


class Changing(nn.Module):
    def forward(self, inputs_embeds, position_ids=None):
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = position_ids.unsqueeze(0)
        position_ids[0, 2] += 1
        return position_ids


class Adding(nn.Module):
    def forward(self, inputs_embeds, position_ids=None):
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = position_ids.unsqueeze(0)
        position_ids += inputs_embeds.shape[0]
        return position_ids


class CountingElsewhere(nn.Module):
    def forward(self, inputs_embeds, position_ids=None):
        if inputs_embeds is not None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = position_ids.unsqueeze(0)
        return position_ids


def test_a_forward_counts_up_if_its_source_says_nothing_else():
    made = {}
    exec("import torch\nclass Made(torch.nn.Module):\n    def forward(self): ...", made)

    assert counts_up(Counting)
    for other in (Doubling, Changing, Adding, CountingElsewhere, nn.Linear, nn.LSTM, made["Made"]):
        assert not counts_up(other)
