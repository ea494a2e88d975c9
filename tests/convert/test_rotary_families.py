"""Each way of rotary embeddings in transformers, against the family's own function and model."""

import importlib

import attrs
import pytest
import torch
import transformers
from convert_families import OWN
from transformers import AutoModelForCausalLM

from automodel_fn import apply, backend_plan
from automodel_fn.cli._configs import default_config
from automodel_fn.cli._small import small_config
from automodel_fn.convert._rotary_conventions import fused, rotary_convention

FUSED = attrs.evolve(OWN, rope_fusion=True)
PAIR, ROWS = "apply_rotary_pos_emb", "apply_rotary_pos_emb_vision"
WAYS = [
    ("llama", PAIR, "pair", False, "halves"),
    ("gpt_oss", PAIR, "pair", False, "half"),
    ("glm", PAIR, "pair", True, "halves"),
    ("cohere", PAIR, "pair", True, "neighbours"),
    ("cohere2", PAIR, "pair", True, "neighbours"),
    ("blt", PAIR, "pair", True, "neighbours"),
    ("glm4v", PAIR, "pair", True, "neighbours"),
    ("ernie4_5_vl_moe", PAIR, "pair", True, "neighbours"),
    ("nanochat", PAIR, "pair", False, "halves"),
    ("gemma3n", PAIR, "single", False, "halves"),
    ("gemma4", PAIR, "single", False, "halves"),
    ("qwen2_vl", ROWS, "rows", False, "halves"),
    ("qwen3_vl", ROWS, "rows", False, "halves"),
    ("llama4", "apply_rotary_emb", "complex", True, "half"),
    ("deepseek_v2", "apply_rotary_emb", "complex", True, "half"),
]
# Vision towers and one-sided functions of which there are few: they stay, with a reason.
OTHERS = [
    ("dinov3_vit", PAIR),
    ("gptj", PAIR),
    ("deepseek_v4", PAIR),
    ("clvp", PAIR),
    ("mistral_large4", "apply_rotary_pos_emb_interleave"),
    ("qwen4_exp", PAIR),
]
# By model type: what each of these is there for is in WAYS.
MODELS = [
    "cohere",
    "cohere2",
    "glm",
    "glm4",
    "nanochat",
    "gemma4_text",
    "llama4_text",
    "deepseek_v2",
]


def function_of(family, name):
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


def small(model_type):
    torch.manual_seed(0)
    config = small_config(model_type, default_config(model_type))
    return AutoModelForCausalLM.from_config(config).float().eval()


def entries(model):
    plan = backend_plan(model, FUSED)
    return [each for each in plan.entries if each.field == "rope_fusion"]


def given_to(form, tables, dtype, num_angles):
    """Heads, tables, and where the heads are: of new values each time."""
    shape = (5, 3, 16) if form == "rows" else (2, 5, 3, 16)
    heads = [torch.randn(shape).to(dtype) for _ in range(1 if form == "single" else 2)]
    angles = torch.randn(*((5,) if form == "rows" else (2, 5)), num_angles)
    if form == "complex":
        return heads, [torch.polar(torch.ones_like(angles), angles)]
    if tables != "half":
        twice = torch.cat((angles, angles), -1)
        angles = angles.repeat_interleave(2, -1) if tables == "neighbours" else twice
    return heads, [angles.cos().to(dtype), angles.sin().to(dtype)]


def listed(found):
    return [found] if isinstance(found, torch.Tensor) else list(found)


@pytest.mark.parametrize(("family", "name", "form", "interleaved", "tables"), WAYS)
def test_how_a_family_turns_is_found(family, name, form, interleaved, tables):
    found = rotary_convention(function_of(family, name))

    assert (found.form, found.interleaved, found.tables) == (form, interleaved, tables)
    assert found.is_backward == (family == "nanochat")


@pytest.mark.parametrize(("family", "name", "form", "interleaved", "tables"), WAYS)
def test_float32_has_the_bits_of_the_familys_function(family, name, form, interleaved, tables):
    function = function_of(family, name)
    heads, table = given_to(form, tables, torch.float32, 8)
    named = {"unsqueeze_dim": 2} if form in ("pair", "single") else {}
    if family == "deepseek_v2":
        heads = [each.transpose(1, 2) for each in heads]
    expected = listed(function(*heads, *table, **named))
    found = listed(fused(rotary_convention(function))(*heads, *table, **named))

    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        if form == "complex":
            torch.testing.assert_close(ours, theirs)
        elif family == "glm":
            pairs = torch.stack(theirs.chunk(2, -1), -1).flatten(-2)
            assert torch.equal(ours, theirs) or torch.equal(ours, pairs)
        else:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["glm", "glm4v"])
def test_what_a_partial_rotation_leaves_is_left(family):
    function = function_of(family, PAIR)
    convention = rotary_convention(function)
    heads, table = given_to("pair", convention.tables, torch.float32, 4)
    expected = function(*heads, *table, unsqueeze_dim=2)
    found = fused(convention)(*heads, *table, unsqueeze_dim=2)

    for ours, theirs, own in zip(found, expected, heads, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours[..., 8:], own[..., 8:])


@pytest.mark.parametrize(("family", "name"), OTHERS)
def test_what_turns_another_way_is_not_taken_for_one_of_these(family, name):
    assert rotary_convention(function_of(family, name)) is None


def test_a_function_that_widens_its_input_is_another_way():
    def widening(q, k, cos, sin, unsqueeze_dim=1):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        return apply_rotary_pos_emb(q.float(), k.float(), cos, sin, unsqueeze_dim)

    assert rotary_convention(widening) is None


def test_a_function_that_turns_the_end_of_a_head_is_another_way():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    def trailing(q, k, cos, sin, unsqueeze_dim=1):
        size = cos.shape[-1]
        turned = apply_rotary_pos_emb(q[..., -size:], k[..., -size:], cos, sin, unsqueeze_dim)
        pairs = zip((q, k), turned, strict=True)
        return tuple(torch.cat((own[..., :-size], each), -1) for own, each in pairs)

    assert rotary_convention(trailing) is None


def test_what_is_no_function_of_pythons_is_another_way():
    assert rotary_convention(torch.add) is None


def test_a_rotation_that_was_not_imported_is_none(monkeypatch):
    from transformers.models.cohere import modeling_cohere

    model = small("cohere")
    monkeypatch.setattr(modeling_cohere, PAIR, None)

    assert entries(model) == []


@pytest.mark.parametrize("model_type", MODELS)
def test_logits_and_gradients_are_those_of_the_untouched_model(model_type):
    model = small(model_type)
    ids = torch.randint(3, 200, (2, 16))
    parameters = [each for each in model.parameters() if each.requires_grad]

    def numbers():
        logits = model(input_ids=ids).logits
        loss = logits.float().logsumexp(-1).mean() + logits[..., 5].float().mean()
        return logits, torch.autograd.grad(loss, parameters, allow_unused=True)

    expected, gradients = numbers()
    found = entries(model)
    assert found
    assert {each.action for each in found} == {"swap"}
    report = apply(backend_plan(model, FUSED))
    ours, theirs = numbers()
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(ours, expected, **tolerance)
    for one, other in zip(theirs, gradients, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, **tolerance)
    report.undo()
    assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("model_type", ["cohere", "nanochat", "gemma4_text"])
def test_attention_is_compiled_whole(model_type):
    model, ids = small(model_type), torch.randint(3, 200, (2, 16))
    apply(backend_plan(model, FUSED))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = compiled(input_ids=ids, use_cache=False).logits

    torch.testing.assert_close(found, model(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "heads"),
    [((2, 3, 5, 8), 0), ((2, 5, 5, 8), 0), ((2, 5, 3, 8), 1), ((5, 3, 8), 1), ((2, 5, 3, 8), -2)],
)
def test_tables_of_all_sequences_are_turned_where_their_dimension_is_added(shape, heads, dtype):
    """Pixtral adds it at 0; of heads in the place of tokens nothing but the bits would tell."""
    function = function_of("pixtral", PAIR)
    generator = torch.Generator().manual_seed(0)
    q, k, angles = (
        torch.randn(size, generator=generator, dtype=dtype) for size in (shape, shape, (5, 4))
    )
    tables = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    expected = function(q, k, *tables, unsqueeze_dim=heads)
    found = fused(rotary_convention(function))(q, k, *tables, unsqueeze_dim=heads)

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "heads"), [((2, 3, 5, 8), 0), ((2, 5, 3, 8), 1)])
def test_so_are_those_of_a_function_on_one_of_the_two(shape, heads):
    function = function_of("gemma3n", PAIR)
    x, angles = torch.randn(shape), torch.randn(5, 4).repeat(1, 2)
    expected = function(x, angles.cos(), angles.sin(), unsqueeze_dim=heads)
    found = fused(rotary_convention(function))(x, angles.cos(), angles.sin(), unsqueeze_dim=heads)

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_pixtral_tower_with_fused_rotary_embeddings_gives_what_it_gave():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    images = {"num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.PixtralVisionConfig(**sizes, **images)
    model, pixels = transformers.PixtralVisionModel(config).eval(), torch.randn(1, 3, 32, 32)
    given = {"pixel_values": pixels, "image_sizes": torch.tensor([[32, 32]])}
    expected = model(**given).last_hidden_state
    report = apply(backend_plan(model, FUSED))
    found = model(**given).last_hidden_state

    assert report.num_swaps
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
