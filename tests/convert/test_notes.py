import attrs
import pytest
from convert_families import OWN, small_model

from automodel_fn import (
    BackendConfig,
    Resolution,
    apply,
    backend_plan,
    resolve,
)

NO_LOGITS = "the fused loss makes no logits"


@pytest.fixture
def llama():
    return small_model("llama")


def about(plan, word):
    return [note for note in plan.notes if word in note]


def test_that_auto_takes_the_logits_of_a_training_step_is_said_and_logged(llama, caplog):
    plan = backend_plan(llama, attrs.evolve(OWN, loss="auto"))

    (note,) = about(plan, NO_LOGITS)
    assert note.endswith("output.logits is None; loss='torch' keeps them")
    apply(plan)
    assert note in caplog.text
    assert backend_plan(llama, attrs.evolve(OWN, loss="auto")).notes == ()


def test_who_asked_for_a_loss_without_logits_is_not_told_so(llama):
    assert backend_plan(llama, attrs.evolve(OWN, loss="fused")).notes == ()


@pytest.mark.parametrize(
    ("family", "asked", "said"),
    [
        ("qwen3_vl", {"attn": "flex"}, "attn=flex was asked for, and no module got it: Qwen3VL"),
        ("gpt_oss", {"swiglu": "fused"}, "swiglu=fused was asked for, and no module got it: it "),
        ("deepseek_v3", {"gate_precision": "bf16"}, "gate_precision=bfloat16 was asked for"),
    ],
)
def test_what_was_asked_for_by_name_and_no_module_got_is_a_note(family, asked, said, gpu):
    base = attrs.evolve(OWN, experts="torch_mm", attn="eager")
    plan = backend_plan(small_model(family), attrs.evolve(base, **asked), availability=gpu)

    (field,) = asked
    (note,) = about(plan, f"{field}=")
    assert note.startswith(said)


def test_what_one_module_got_is_no_note(llama):
    asked = attrs.evolve(OWN, rms_norm="torch_fp32")

    assert backend_plan(llama, asked, skip="model.norm").notes == ()


def test_what_auto_chose_in_vain_is_no_note(gpu):
    plan = backend_plan(
        small_model("gpt_oss"),
        attrs.evolve(OWN, attn="eager", experts="torch_mm", swiglu="auto"),
        availability=gpu,
    )

    assert {each.action for each in plan.entries if each.field == "swiglu"} == {"skip"}
    assert plan.notes == ()


def test_a_pattern_is_quoted_as_it_was_given(llama):
    pattern = "re:as asked|model[.]norm"
    plan = backend_plan(llama, BackendConfig(attn="sdpa", linear="torch"), skip=pattern)

    assert {e.reason for e in plan.entries if e.name == "model.norm"} == {f"skip={pattern!r}"}


def test_a_dispatcher_that_was_asked_for_is_a_note(llama, gpu):
    resolution = resolve(attrs.evolve(OWN, experts="torch_mm"), gpu)
    assert about(backend_plan(llama, resolution), "dispatcher") == []
    backend = attrs.evolve(resolution.backend, dispatcher="deepep")

    assert about(
        backend_plan(llama, Resolution(backend, fields=())), "dispatcher=deepep has nothing to act"
    )
