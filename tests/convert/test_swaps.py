import copy
import pickle

import attrs
import pytest
import torch
from convert_families import OWN, batch_of, small_model
from torch import nn

from automodel_fn import ConfigError, StalePlanError, apply, backend_plan, bf16
from automodel_fn.cast import cast_plan
from automodel_fn.convert import _changes

OTHER = attrs.evolve(OWN, rms_norm="torch_fp32", attn="eager")


@pytest.fixture
def llama():
    return small_model("llama")


def test_a_swap_keeps_modules_parameters_hooks_and_names(llama):
    modules, parameters = dict(llama.named_modules()), dict(llama.named_parameters())
    keys, seen = list(llama.state_dict()), []
    handle = llama.model.norm.register_forward_hook(lambda *_: seen.append("hook"))
    llama.model.norm.weight.requires_grad_(False)
    apply(backend_plan(llama, OTHER))
    llama(**batch_of("llama"))

    assert all(modules[name] is each for name, each in llama.named_modules())
    assert all(parameters[name] is each for name, each in llama.named_parameters())
    assert list(llama.state_dict()) == keys
    assert not llama.model.norm.weight.requires_grad
    handle.remove()
    llama(**batch_of("llama"))
    assert seen == ["hook"]


def test_a_swapped_module_has_the_name_of_its_own_class_and_is_one(llama):
    own = type(llama.model.norm)
    apply(backend_plan(llama, OTHER))

    assert type(llama.model.norm) is not own
    assert isinstance(llama.model.norm, own)
    assert type(llama.model.norm).__name__ == own.__name__
    assert type(llama.model.norm) is type(llama.model.layers[0].input_layernorm)


def test_undo_brings_back_all_that_was_there(llama, state):
    before = state(llama)
    report = apply(backend_plan(llama, OTHER))
    assert state(llama) != before
    report.undo()

    assert state(llama) == before


def test_the_inverse_brings_back_all_that_was_there(llama, state):
    before = state(llama)
    plan = backend_plan(llama, OTHER)
    apply(plan)
    apply(plan.inverse(), llama)

    assert state(llama) == before


def test_a_plan_from_one_model_fits_another_of_its_kind(llama):
    plan = backend_plan(llama, OTHER)
    other = small_model("llama", seed=1)
    apply(plan, other)

    assert type(llama.model.norm) is not type(other.model.norm)
    assert other.config._attn_implementation == "eager"
    assert llama.config._attn_implementation == "sdpa"


def test_a_second_plan_starts_from_what_the_first_left(llama):
    apply(backend_plan(llama, OTHER))
    back = backend_plan(llama, OWN)
    changed = {(each.field, each.before, each.after) for each in back.entries if each.changes}

    assert changed == {("rms_norm", "torch_fp32", "torch"), ("attn", "eager", "sdpa")}
    apply(back)
    assert "automodel_fn_settings" not in vars(type(llama.model.norm))


def test_a_plan_is_refused_where_the_model_has_changed_and_all_is_listed(llama, state):
    plan = backend_plan(llama, OTHER)
    llama.model.layers[0].input_layernorm = nn.LayerNorm(32)
    llama.config._attn_implementation = "eager"
    llama.model.extra = copy.deepcopy(llama.model.norm)
    before = state(llama)
    with pytest.raises(StalePlanError) as caught:
        apply(plan)

    assert state(llama) == before
    text = str(caught.value)
    assert "attn: planned from sdpa, found eager" in text
    assert "planned as a LlamaRMSNorm, found a LayerNorm" in text
    assert "model.extra, rms_norm: in the model, but not in the plan" in text


def test_a_plan_is_applied_once(llama):
    plan = backend_plan(llama, OTHER)
    report = apply(plan)
    with pytest.raises(StalePlanError, match="planned from torch, found torch_fp32"):
        apply(plan)
    report.undo()
    with pytest.raises(StalePlanError):
        report.undo()


@pytest.mark.parametrize("position", range(6))
def test_a_failure_at_any_change_leaves_the_model_as_it_was(llama, state, monkeypatch, position):
    plan, before, done = backend_plan(llama, OTHER), state(llama), []

    def failing(own):
        def exchange(self):
            if len(done) == position:
                done.append("failed")
                raise KeyboardInterrupt
            done.append("")
            own(self)

        return exchange

    for cls in (_changes.ClassChange, _changes.ConfigChange):
        monkeypatch.setattr(cls, "exchange", failing(cls.exchange))
    with pytest.raises(KeyboardInterrupt):
        apply(plan)

    assert "failed" in done
    assert state(llama) == before


def test_a_copy_and_a_pickle_run_as_the_swapped_model_does(llama):
    apply(backend_plan(llama, OTHER))
    batch = batch_of("llama")
    expected = llama(**batch).logits
    for again in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        assert torch.equal(again(**batch).logits, expected)
        assert type(again.model.norm) is type(llama.model.norm)
        apply(backend_plan(again, OWN))
        assert type(again.model.norm).__mro__[1] is nn.Module


def test_what_was_swapped_in_part_is_taken_back_and_made_again(llama, state):
    before = state(llama)
    apply(backend_plan(llama, attrs.evolve(OWN, compile_attn=True), skip="model.layers.0"))
    partly = state(llama)
    report = apply(backend_plan(llama, OWN))
    assert state(llama) == before
    report.undo()

    assert state(llama) == partly


def test_there_is_nothing_to_take_a_checksum_of(llama):
    with pytest.raises(ConfigError, match="changes no tensor"):
        apply(backend_plan(llama, OTHER), checksum=True)


def test_notes_are_said_once_where_the_plan_is_applied(llama, caplog):
    asked = attrs.evolve(OTHER, gate_precision="fp32")
    report = apply(backend_plan(llama, asked))
    report.undo()

    (record,) = caplog.records
    assert "gate_precision=float32 has nothing to act on" in record.getMessage()


def test_a_module_that_is_registered_twice_is_swapped_once():
    model = nn.Module()
    norm = small_model("llama").model.norm
    model.one, model.two = norm, norm
    plan = backend_plan(model, OTHER)

    assert plan.entries[0].names == ("one", "two")
    assert apply(plan).num_swaps == 1
    assert model.one is model.two


def test_a_model_can_be_cast_after_a_swap(llama):
    apply(backend_plan(llama, OTHER))
    apply(cast_plan(llama, bf16))

    assert llama(**batch_of("llama")).logits.dtype == bf16
    apply(backend_plan(llama, OWN))


def test_a_swap_on_meta_needs_no_memory():
    llama = small_model("llama").to("meta")
    apply(backend_plan(llama, OTHER))

    assert llama.model.norm(torch.empty(2, 32, device="meta")).shape == (2, 32)


def test_a_swapped_model_is_compiled_whole(llama):
    apply(backend_plan(llama, OTHER))
    batch = batch_of("llama")
    compiled = torch.compile(llama, backend="aot_eager", fullgraph=True)

    assert torch.equal(compiled(**batch).logits, llama(**batch).logits)


def test_a_class_that_was_made_over_a_swapped_one_is_left_alone(llama):
    apply(backend_plan(llama, OTHER))
    norm = llama.model.norm
    norm.__class__ = type("Sharded", (type(norm),), {})
    found = [each for each in backend_plan(llama, OWN).entries if "model.norm" in each.names]

    assert found[0].action == "skip"
    assert found[0].reason.startswith("somebody else has made a class over one")
