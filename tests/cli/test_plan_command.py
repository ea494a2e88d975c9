import json
from collections import Counter

import pytest

from automodel_fn import CastPlan


def test_a_plan_is_a_table_of_a_type_at_its_default_sizes(cli):
    code, out, err = cli("plan", "deepseek_v3")
    entries = CastPlan.from_json(cli("plan", "deepseek_v3", "--json")[1]).entries

    assert (code, err) == (0, "")
    assert "model.layers.{3-60}.mlp.gate.e_scor" in out
    counts = Counter(entry.action for entry in entries)
    total = f"{counts['cast']} cast, {counts['keep']} keep, {counts['skip']} skip"
    assert counts["keep"] >= 58
    assert f"969 tensors: {total}; 2.4 TiB -> 1.2 TiB" in out


def test_json_is_the_plan_and_nothing_else(cli, tmp_path):
    page = tmp_path / "plan.html"
    code, out, err = cli(
        *("plan", "gpt2", "--json", "--html", page, "--dtype", "fp16"),
        *("--keep-fp32", "*.ln_1", "--keep-fp32", "re:.*ln_f.*", "--skip", "transformer.wpe"),
    )

    assert (code, err) == (0, "")
    plan = CastPlan.from_json(out)
    actions = {entry.name: entry.action for entry in plan.entries}
    assert actions["transformer.h.11.ln_1.bias"] == "keep"
    assert actions["transformer.ln_f.weight"] == "keep"
    assert actions["transformer.wpe.weight"] == "skip"
    assert {str(e.to_dtype) for e in plan.entries if e.action == "cast"} == {"torch.float16"}
    assert "Cast plan of gpt2" in page.read_text()


@pytest.mark.parametrize(
    ("match", "has_pins"), [("substring", True), ("segment", True), ("hf", False)]
)
def test_keywords_match_by_the_rule_that_is_asked_for(cli, match, has_pins):
    code, out, _ = cli("plan", "gpt_oss", "--match", match, "--json")

    assert code == 0
    kept = [entry for entry in json.loads(out)["entries"] if entry["action"] == "keep"]
    assert bool(kept) is has_pins  # in bf16 transformers itself drops plain keywords


def test_notes_stand_once_beneath_the_table(cli):
    code, out, err = cli("plan", "gpt_oss")

    assert (code, err) == (0, "")
    assert out.count("note: keyword 'norm' of GptOssForCausalLM._keep_in_fp32_modules") == 1


def test_a_folder_needs_no_weights(cli, checkpoint):
    from transformers import LlamaConfig

    code, out, _ = cli("plan", checkpoint(LlamaConfig(num_hidden_layers=2)), "--json")

    assert code == 0
    assert len(json.loads(out)["entries"]) > 20
