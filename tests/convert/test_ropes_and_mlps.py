import attrs
import pytest
import torch
import transformers
from convert_families import OWN, batch_of, small_model
from torch import nn

from automodel_fn import apply, backend_plan
from automodel_fn.cli._configs import default_config
from automodel_fn.cli._small import small_config
from automodel_fn.convert import _mlps
from automodel_fn.convert._overlay import Overlay, with_globals
from automodel_fn.convert._rotary_conventions import rotary_convention

FUSED = attrs.evolve(OWN, rope_fusion=True, swiglu="fused", experts="torch_mm")


def by_name(plan, field):
    return {each.name: each for each in plan.entries if each.field == field}


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_rotary_embeddings_in_float32_have_the_bits_of_the_familys_own(family, gpu):
    model, batch = small_model(family).eval(), batch_of(family)
    expected = model(**batch).logits
    apply(backend_plan(model, FUSED, skip="*mlp*", availability=gpu))

    assert torch.equal(model(**batch).logits, expected)


def test_attention_that_turns_another_way_is_skipped(monkeypatch, gpu):
    from transformers.models.llama import modeling_llama

    def backwards(q, k, cos, sin, unsqueeze_dim=1):
        return q * cos.unsqueeze(unsqueeze_dim), k

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", backwards)
    found = by_name(backend_plan(small_model("llama"), FUSED, availability=gpu), "rope_fusion")

    assert {each.action for each in found.values()} == {"skip"}
    assert all("turns another way" in each.reason for each in found.values())


def test_a_function_that_takes_heads_in_one_order_only_is_another_way():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    def heads_first(q, k, cos, sin, unsqueeze_dim=1):
        return apply_rotary_pos_emb(q, k, cos, sin)

    assert rotary_convention(apply_rotary_pos_emb) is not None
    assert rotary_convention(heads_first) is None


def test_rotary_embeddings_of_a_cache_are_turned_by_their_positions(gpu):
    model = small_model("llama").eval()
    ids = batch_of("llama")["input_ids"]
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    apply(backend_plan(model, FUSED, availability=gpu))

    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)


def test_an_mlp_of_another_activation_is_skipped(gpu):
    found = by_name(backend_plan(small_model("gemma3"), FUSED, availability=gpu), "swiglu")

    assert {each.reason for each in found.values()} == {"it computes no silu(gate) * up"}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("is_training", [True, False])
def test_an_mlp_with_a_dropout_is_skipped_whatever_the_mode(gpu, dropout, is_training):
    config = transformers.SeedOssConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=96,
        residual_dropout=dropout,
    )
    model, random = (
        transformers.SeedOssForCausalLM(config).train(is_training),
        torch.get_rng_state(),
    )
    found = by_name(backend_plan(model, FUSED, availability=gpu), "swiglu")

    assert found["model.layers.0.mlp"].action == ("skip" if dropout else "swap")
    assert torch.equal(torch.get_rng_state(), random)


class Plain(nn.Module):
    """An MLP as most families have it, and places for what some do beside."""

    def __init__(self, size=8):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(size, size), nn.Linear(size, size)
        self.down_proj, self.dropout = nn.Linear(size, size), nn.Dropout(0.5)

    def forward(self, x):
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class WithDropout(Plain):
    def forward(self, x):
        product = torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(self.dropout(product))


class WithHalvedInput(Plain):
    def forward(self, x):
        x = x / 2
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class WithGateCutOff(Plain):
    def forward(self, x):
        gate = self.gate_proj(x).clamp(max=100.0)
        return self.down_proj(torch.nn.functional.silu(gate) * self.up_proj(x))


class WithUpCutOff(Plain):
    def forward(self, x):
        up = self.up_proj(x).clamp(-100.0, 100.0)
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * up)


@pytest.mark.parametrize("choice", ["fused", "recomputed"])
@pytest.mark.parametrize("is_training", [True, False])
def test_an_mlp_that_does_anything_beside_is_skipped(choice, is_training):
    kinds = (Plain, WithDropout, WithHalvedInput, WithGateCutOff, WithUpCutOff)
    model = nn.Sequential(*(kind() for kind in kinds)).train(is_training)
    found = by_name(backend_plan(model, attrs.evolve(OWN, swiglu=choice)), "swiglu")

    assert [each.action for each in found.values()] == ["swap", "skip", "skip", "skip", "skip"]
    assert {found[str(n)].reason for n in range(1, 5)} == {"it computes no silu(gate) * up"}


def test_mlps_and_experts_that_cut_large_values_off_are_skipped(gpu):
    """DeepSeek V4's do, at 10, which values of the size of a fresh model's never reach."""
    config = small_config("deepseek_v4", default_config("deepseek_v4"))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    found = by_name(backend_plan(model, FUSED, availability=gpu), "swiglu")

    assert {each.module_class for each in found.values()} == {
        "DeepseekV4MLP",
        "DeepseekV4Experts",
    }
    assert {(each.action, each.reason) for each in found.values()} == {
        ("skip", "it computes no silu(gate) * up")
    }


def test_a_packed_projection_is_split_where_it_lies(gpu):
    config = transformers.Phi3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model, batch = transformers.Phi3ForCausalLM(config).eval(), batch_of("llama")
    expected = model(**batch).logits
    plan = backend_plan(model, FUSED, availability=gpu)
    apply(plan)

    assert by_name(plan, "swiglu")["model.layers.0.mlp"].action == "swap"
    torch.testing.assert_close(model(**batch).logits, expected)


def test_experts_in_a_loop_are_kept_and_grouped_ones_are_swapped(gpu):
    model = small_model("qwen3_moe")
    looped = backend_plan(model, attrs.evolve(FUSED, experts="torch"), availability=gpu)
    grouped = backend_plan(model, FUSED, availability=gpu)

    assert by_name(looped, "swiglu")["model.layers.0.mlp.experts"].action == "keep"
    assert by_name(grouped, "swiglu")["model.layers.0.mlp.experts"].action == "swap"


def test_recomputed_mlps_go_by_way_of_the_recompute_and_experts_are_skipped(monkeypatch, gpu):
    calls, own = [], _mlps.recomputed_swiglu
    monkeypatch.setattr(_mlps, "recomputed_swiglu", lambda *a: calls.append(a) or own(*a))
    grads = []
    for choice in ("fused", "recomputed"):
        model = small_model("llama")
        report = apply(backend_plan(model, attrs.evolve(OWN, swiglu=choice)))
        model(**batch_of("llama")).loss.backward()
        assert len(calls) == (report.num_swaps if choice == "recomputed" else 0)
        grads.append([each.grad for each in model.parameters()])
    moe = attrs.evolve(OWN, swiglu="recomputed", experts="torch_mm")
    found = by_name(backend_plan(small_model("qwen3_moe"), moe, availability=gpu), "swiglu")

    assert all(map(torch.equal, *grads))
    assert found["model.layers.0.mlp.experts"].action == "skip"
    assert found["model.layers.0.mlp.experts"].reason.endswith("swiglu='fused' is for them")


def test_what_is_overlaid_is_seen_and_not_changed():
    layer = nn.Linear(2, 2)
    weight = layer.weight
    seen = Overlay(layer, weight=torch.eye(2))
    seen.more = 1

    assert torch.equal(seen.weight, torch.eye(2))
    assert seen.bias is layer.bias
    assert layer.weight is weight
    assert not hasattr(layer, "more")


def test_a_copy_of_a_decorated_function_sees_other_globals_and_the_own_one_does_not():
    from functools import wraps

    def doubled(function):
        @wraps(function)
        def wrapper(*args, **kwargs):
            return 2 * function(*args, **kwargs)

        return wrapper

    @doubled
    def length(text, *, more=1):
        return len(text) + more

    copied = with_globals(length, {"len": lambda text: 100})

    assert (length("abc"), copied("abc"), copied("abc", more=5)) == (8, 202, 210)
    assert copied.__name__ == "length"


def test_attention_with_one_operation_for_both_is_compiled_whole(gpu):
    model = small_model("llama").eval()
    apply(backend_plan(model, FUSED, availability=gpu))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    batch = batch_of("llama")

    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)
