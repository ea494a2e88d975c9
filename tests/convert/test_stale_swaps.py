"""Plans, some of them edited by hand, that a model does not fit: refused, and nothing changed."""

import copy

import attrs
import pytest
import torch
from convert_families import OWN, small_model
from torch import nn

from automodel_fn import BackendPlan, ModuleSwap, StalePlanError, apply, backend_plan

NORMS = attrs.evolve(OWN, rms_norm="torch_fp32")


@pytest.fixture
def llama():
    return small_model("llama")


def edited(plan, chosen, **changes):
    """The plan with other words in one of its entries."""
    entries = [attrs.evolve(e, **changes) if chosen(e) else e for e in plan.entries]
    return attrs.evolve(plan, entries=tuple(entries))


def refused(plan, model, state):
    before = state(model)
    with pytest.raises(StalePlanError) as caught:
        apply(plan, model)
    assert state(model) == before
    return str(caught.value)


def test_a_second_name_that_came_later_is_a_difference(llama, state):
    plan = backend_plan(llama, NORMS)
    llama.model.again = llama.model.norm

    assert "model.norm, rms_norm: planned under the names ('model.norm',), found under" in (
        refused(plan, llama, state)
    )


def test_another_reader_of_a_config_is_a_difference(llama, state):
    plan = backend_plan(llama, attrs.evolve(OWN, attn="eager"))
    llama.model.extra = copy.copy(llama.model.layers[0].self_attn)

    assert "attn: planned for 2 readers of one config, found 3" in refused(plan, llama, state)


def test_a_field_that_there_is_not_is_a_difference(llama, state):
    plan = backend_plan(llama, NORMS)
    unknown = edited(plan, lambda e: e.name == "model.norm", field="norms")

    assert "model.norm, norms: there is no such field" in refused(unknown, llama, state)


def test_a_module_that_the_field_has_nothing_to_do_with_is_a_difference(llama, state):
    words = {"before": "False", "after": "True", "action": "swap", "reason": ""}
    swap = ModuleSwap(("model.norm",), field="compile_attn", module_class="LlamaRMSNorm", **words)

    assert "model.norm, compile_attn: planned, but the field has nothing to do with it" in (
        refused(BackendPlan((swap,)), llama, state)
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda norm: setattr(norm, "forward", norm.forward),
            "its forward was replaced on the module itself",
        ),
        (lambda norm: norm.__setattr__("weight", None), "it has no parameter named weight"),
    ],
)
def test_what_could_not_be_planned_now_is_a_difference(llama, state, change, said):
    plan = backend_plan(llama, NORMS)
    change(llama.model.norm)

    assert f"model.norm, rms_norm: {said}" in refused(plan, llama, state)


def test_a_head_that_came_later_is_a_difference(llama, state):
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    plan = backend_plan(llama, attrs.evolve(OWN, loss="fused"))
    llama.lm_head = Scaled(32, 96, bias=False)

    assert "(model), loss: its head is a Scaled, and no plain Linear" in refused(plan, llama, state)


def test_a_norm_without_a_weight_is_left_alone():
    class WithoutRMSNorm(type(small_model("llama").model.norm)):
        def __init__(self):
            super().__init__(4)
            self.weight = None

    (entry,) = backend_plan(nn.Sequential(WithoutRMSNorm()), NORMS).entries
    assert (entry.action, entry.reason) == ("skip", "it has no parameter named weight")


def test_a_norm_of_this_library_is_none_to_swap():
    from automodel_fn import Float32RMSNorm

    assert backend_plan(nn.Sequential(Float32RMSNorm(4)), NORMS).entries == ()


def test_a_module_named_otherwise_is_no_router():
    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.top_k, self.num_experts = nn.Parameter(torch.ones(4, 4)), 2, 4

        def forward(self, x):
            return torch.topk(x @ self.weight, self.top_k)

    plan = backend_plan(nn.Sequential(Weights()), attrs.evolve(OWN, fake_balanced_gate=True))
    assert [each for each in plan.entries if each.field == "fake_balanced_gate"] == []
