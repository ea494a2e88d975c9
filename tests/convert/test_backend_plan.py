import copy
import pickle

import attrs
import pytest
import torch
from convert_families import OWN, batch_of, small_model
from torch import nn

from automodel_fn import (
    BackendConfig,
    BackendPlan,
    BackendUnavailableError,
    ConfigError,
    ModuleSwap,
    Plan,
    apply,
    backend_plan,
    probe,
    resolve,
)


def entry_of(plan, name, field):
    (found,) = [each for each in plan.entries if name in each.names and each.field == field]
    return found


@pytest.fixture
def llama():
    return small_model("llama")


def test_a_plan_is_a_plan(llama):
    assert isinstance(backend_plan(llama, OWN), Plan)


def test_what_runs_as_asked_is_kept_and_says_so(llama):
    plan = backend_plan(llama, OWN)

    assert {each.action for each in plan.entries} == {"keep"}
    assert entry_of(plan, "model.layers.1.self_attn", "attn").reason == "already sdpa"
    assert entry_of(plan, "model.norm", "rms_norm").reason == "its own code, as asked"


def test_what_auto_chose_is_told_apart_from_what_was_asked_for(llama):
    plan = backend_plan(llama, attrs.evolve(OWN, rope_fusion="auto", rms_norm="torch_fp32"))

    attention = "model.layers.0.self_attn"
    assert entry_of(plan, attention, "rope_fusion").reason == "as 'auto' chose"
    assert entry_of(plan, "model.norm", "rms_norm").reason == "as asked"
    named = backend_plan(llama, attrs.evolve(OWN, rope_fusion=True))
    assert entry_of(named, attention, "rope_fusion").reason == "as asked"


def test_what_was_asked_for_is_swapped_with_the_class_it_is_of(llama):
    found = entry_of(
        backend_plan(llama, attrs.evolve(OWN, rms_norm="torch_fp32")), "model.norm", "rms_norm"
    )

    assert (found.before, found.after, found.action) == ("torch", "torch_fp32", "swap")
    assert found.module_class == "LlamaRMSNorm"


def test_modules_that_read_one_config_have_one_entry(llama):
    found = entry_of(
        backend_plan(llama, attrs.evolve(OWN, attn="eager")), "model.layers.0.self_attn", "attn"
    )

    assert found.names == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    assert (found.before, found.after) == ("sdpa", "eager")


@pytest.mark.parametrize("pattern", ["model.norm", "model.*norm", "re:model[.]n.*"])
def test_skip_leaves_modules_alone_by_every_kind_of_pattern(llama, pattern):
    plan = backend_plan(llama, attrs.evolve(OWN, rms_norm="torch_fp32"), skip=pattern)
    found = entry_of(plan, "model.norm", "rms_norm")

    assert (found.action, found.after) == ("skip", "torch")
    assert found.reason == f"skip={pattern!r}"


def test_skip_of_a_module_is_of_all_beneath_it(llama):
    plan = backend_plan(
        llama, attrs.evolve(OWN, rms_norm="torch_fp32", attn="eager"), skip="model.layers.0"
    )
    swapped = {name for each in plan.entries if each.action == "swap" for name in each.names}

    assert swapped == {
        "model.layers.1.input_layernorm",
        "model.layers.1.post_attention_layernorm",
        "model.norm",
    }
    reason = entry_of(plan, "model.layers.1.self_attn", "attn").reason
    assert reason == "skip='model.layers.0', whose config all of these read"


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_name(llama):
    with pytest.raises(ConfigError, match=r"skip='model.nrm' matches no module; near: model.norm"):
        backend_plan(llama, OWN, skip="model.nrm")


def test_a_parameter_is_no_module_to_skip(llama):
    with pytest.raises(ConfigError, match=r"skip='model.norm.weight' matches no module"):
        backend_plan(llama, OWN, skip="model.norm.weight")


def test_planning_reads_only(llama, state):
    before, random = state(llama), torch.get_rng_state()
    backend_plan(llama, BackendConfig(attn="eager", compile_attn=True, linear="torch"))

    assert state(llama) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_on_meta_the_plan_is_the_same(llama):
    backend = attrs.evolve(OWN, rms_norm="torch_fp32", attn="eager")

    assert backend_plan(copy.deepcopy(llama).to("meta"), backend) == backend_plan(llama, backend)


def test_a_plan_comes_back_from_json_and_from_a_pickle_without_its_model(llama):
    plan = backend_plan(llama, attrs.evolve(OWN, rms_norm="torch_fp32"))
    for again in (BackendPlan.from_json(plan.to_json()), pickle.loads(pickle.dumps(plan))):
        assert again == plan
        with pytest.raises(ConfigError, match="this plan has no model"):
            apply(again)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("{}", "no backend plan: expected format='automodel_fn.backend_plan/1'"),
        ('{"format": "automodel_fn.backend_plan/1", "notes": []}', r"plan\.entries=None"),
        ('{"format": "automodel_fn.backend_plan/1", "notes": 1, "entries": []}', r"plan\.notes=1"),
        (
            '{"format": "automodel_fn.backend_plan/1", "notes": [], "entries": [3]}',
            r"entries\[0\]=3 must be an object",
        ),
        (
            '{"format": "automodel_fn.backend_plan/1", "notes": [], "entries": [{"names": []}]}',
            r"entries\[0\]\.names=\[\] must name the module",
        ),
        (
            '{"format": "automodel_fn.backend_plan/1", "notes": [], "entries": [{"names": ["a"]}]}',
            r"entries\[0\]\.field=None must be a str",
        ),
    ],
)
def test_what_is_no_plan_is_refused_with_its_place(text, message):
    with pytest.raises(ConfigError, match=message):
        BackendPlan.from_json(text)


def test_an_entry_says_one_thing():
    with pytest.raises(ConfigError, match="keep linear from 'torch' to 'te' is no entry"):
        ModuleSwap(
            ("a",),
            field="linear",
            module_class="Linear",
            before="torch",
            after="te",
            action="keep",
            reason="",
        )


def test_two_plans_differ_where_they_say_different_things(llama):
    ours = backend_plan(llama, OWN)
    theirs = backend_plan(llama, attrs.evolve(OWN, rms_norm="torch_fp32"), skip="model.layers")

    assert {each.name for each in ours.diff(theirs)} >= {"model.norm"}
    assert str(next(each for each in ours.diff(theirs) if each.name == "model.norm")) == (
        "model.norm, rms_norm: keep torch (its own code, as asked) -> "
        "swap torch to torch_fp32 (as asked)"
    )
    assert ours.diff(ours) == ()


def test_the_inverse_of_the_inverse_is_the_plan(llama):
    plan = backend_plan(llama, attrs.evolve(OWN, rms_norm="torch_fp32", attn="eager"))

    assert plan.inverse().inverse() == plan
    assert plan.inverse() != plan


def test_what_is_asked_for_by_name_and_acts_on_nothing_is_a_note(llama):
    asked = attrs.evolve(OWN, gate_precision="fp32", experts="torch", dispatcher="torch")

    assert backend_plan(llama, asked).notes == (
        "experts=torch has nothing to act on in this model",
        "gate_precision=float32 has nothing to act on in this model",
    )


def test_fields_that_no_module_reads_are_notes(llama):
    asked = attrs.evolve(OWN, enable_fsdp_optimizations=True, enable_hf_state_dict_adapter=False)

    assert [note.partition("=")[0] for note in backend_plan(llama, asked).notes] == [
        "enable_hf_state_dict_adapter",
        "enable_fsdp_optimizations",
    ]


def test_a_resolution_is_taken_as_it_is(llama):
    resolution = resolve(OWN, probe())

    assert backend_plan(llama, resolution) == backend_plan(llama, OWN)


def test_what_cannot_run_here_is_an_error(llama, gpu):
    asked = attrs.evolve(OWN, linear="te")
    with pytest.raises(BackendUnavailableError, match="linear='te'"):
        backend_plan(llama, asked, availability=attrs.evolve(gpu, packages=()))


def test_a_backend_of_another_kind_is_an_error(llama):
    with pytest.raises(ConfigError, match="backend=str must be a BackendConfig"):
        backend_plan(llama, "sdpa")


@pytest.mark.parametrize("family", ["qwen3_vl", "gpt_oss"])
def test_what_transformers_does_not_support_is_skipped_and_says_so(family):
    asked = attrs.evolve(OWN, attn="flex" if family == "qwen3_vl" else "sdpa")
    found = [e for e in backend_plan(small_model(family), asked).entries if e.field == "attn"]

    assert {each.action for each in found} == {"skip"}
    assert all("of transformers does not support" in each.reason for each in found)


def test_a_module_with_a_forward_of_its_own_is_skipped(llama):
    llama.model.norm.forward = llama.model.norm.forward
    found = entry_of(
        backend_plan(llama, attrs.evolve(OWN, rms_norm="torch_fp32")), "model.norm", "rms_norm"
    )

    assert found.action == "skip"
    assert "replaced on the module itself" in found.reason


def test_a_norm_that_is_none_that_is_known_is_skipped():
    class OddRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-6

        def forward(self, x):
            return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps) ** 2

    plan = backend_plan(nn.Sequential(OddRMSNorm()), attrs.evolve(OWN, rms_norm="torch_fp32"))

    assert plan.entries[0].action == "skip"
    assert "none of the RMSNorms that are known" in plan.entries[0].reason


def test_a_router_that_projects_in_float32_anyway_is_kept():
    model = small_model("deepseek_v3")
    found = backend_plan(model, attrs.evolve(OWN, gate_precision="fp32")).entries

    assert {e.reason for e in found if e.field == "gate_precision"} == {
        "its own code projects in float32"
    }
    found = backend_plan(model, attrs.evolve(OWN, gate_precision="bf16")).entries
    assert {e.action for e in found if e.field == "gate_precision"} == {"skip"}


def test_a_model_runs_after_planning_as_before(llama):
    batch = batch_of("llama")
    before = llama(**batch).logits
    backend_plan(llama, BackendConfig())

    assert torch.equal(llama(**batch).logits, before)
