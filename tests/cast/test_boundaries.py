from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3RMSNorm,
    DeepseekV3TopkRouter,
)

from automodel_fn import PatchError, apply, bf16, cast_plan, fp16, fp32, fp32_boundaries


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return (x.float() @ self.weight.float().t()).softmax(-1).to(x.dtype)


class Promoting(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x, *, shift=None, twice=False):
        x = x * self.scale if shift is None else x * self.scale + shift
        return (x, {"again": x, "count": torch.tensor([2])}) if twice else x


def pinned(module, dtype=bf16):
    model = nn.Sequential(module)
    return model, cast_plan(model, dtype, keep_fp32="0")


def activation(*shape):
    return torch.randn(*shape).to(bf16)


NEEDING = {
    "Linear": (lambda: nn.Linear(4, 3), lambda: activation(2, 4)),
    "Linear without bias": (lambda: nn.Linear(4, 3, bias=False), lambda: activation(2, 4)),
    "LayerNorm": (lambda: nn.LayerNorm(4), lambda: activation(2, 4)),
    "Embedding": (lambda: nn.Embedding(3, 4), lambda: torch.tensor([[0, 2]])),
    "RMSNorm of transformers": (lambda: DeepseekV3RMSNorm(4), lambda: activation(1, 2, 4)),
    "promoting": (Promoting, lambda: activation(2, 4)),
    "Conv2d": (lambda: nn.Conv2d(2, 3, 1), lambda: activation(1, 2, 4, 4)),
    "Conv1d": (lambda: nn.Conv1d(4, 3, 3), lambda: activation(1, 4, 8)),
    "parametrized": (lambda: weight_norm(nn.Linear(4, 3)), lambda: activation(2, 4)),
}
EACH = pytest.mark.parametrize(("make", "sample"), NEEDING.values(), ids=NEEDING)


@EACH
def test_a_pin_that_breaks_or_promotes_gets_a_boundary_and_a_note(make, sample):
    model, plan = pinned(make())

    assert any("'0'" in note and "fp32_boundaries(model, plan)" in note for note in plan.notes)
    assert fp32_boundaries(model, plan).names == ("0",)


@EACH
def test_inside_a_boundary_the_pin_computes_in_fp32_and_returns_the_old_dtype(make, sample):
    model, plan = pinned(make())
    apply(plan)
    x = sample()
    expected = model[0](x.float() if x.is_floating_point() else x).to(bf16)

    with fp32_boundaries(model, plan):
        output = model(x)

    assert {p.dtype for p in model.parameters()} == {fp32}
    assert output.dtype == bf16
    assert torch.equal(output, expected)


@EACH
def test_removal_leaves_no_trace(make, sample):
    model, plan = pinned(make())
    before = {name: dict(vars(m)) for name, m in model.named_modules()}

    handle = fp32_boundaries(model, plan)
    changed = {name: dict(vars(m)) for name, m in model.named_modules()}
    handle.remove()

    assert changed != before
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == before


def router_of_transformers():
    config = DeepseekV3Config(
        hidden_size=4, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1
    )
    return DeepseekV3TopkRouter(config)


@pytest.mark.parametrize("make", [Router, router_of_transformers])
def test_what_casts_by_itself_gets_none(make):
    model, plan = pinned(make())

    assert not any("fp32_boundaries(model, plan): given" in note for note in plan.notes)
    assert fp32_boundaries(model, plan).names == ()


class CastsIfAsked(nn.Module):
    def __init__(self, casts):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.casts = casts

    def forward(self, x):
        return (x * self.scale).to(x.dtype) if self.casts else x * self.scale


def test_modules_that_differ_in_a_setting_are_tried_each():
    model = nn.Sequential(CastsIfAsked(True), CastsIfAsked(False))

    with fp32_boundaries(model, cast_plan(model, bf16, keep_fp32=["0", "1"])) as handle:
        assert handle.names == ("1",)


def test_an_fp32_model_needs_none():
    model, plan = pinned(nn.Linear(2, 2), fp32)

    assert fp32_boundaries(model, plan).names == ()


def test_only_the_owners_of_pins_get_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))

    assert fp32_boundaries(model, cast_plan(model, bf16, keep_fp32="1")).names == ("1",)
    assert fp32_boundaries(model, cast_plan(model, bf16)).names == ()


def test_a_module_registered_twice_gets_one_and_a_tied_weight_one_for_each_owner():
    layer, head = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
    head.weight = layer.weight
    model = nn.ModuleDict({"a": layer, "again": layer, "head": head})

    handle = fp32_boundaries(model, cast_plan(model, bf16, keep_fp32="a"))

    assert handle.names == ("a", "head")


def test_a_model_with_pins_runs_in_bf16_from_end_to_end():
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2))
    plan = cast_plan(model, bf16, keep_fp32=["0", "1", "2"])
    apply(plan)

    with pytest.raises(RuntimeError):
        model(torch.tensor([[1, 2]]))
    with fp32_boundaries(model, plan):
        assert model(torch.tensor([[1, 2]])).dtype == bf16


def test_gradients_flow_and_have_the_dtypes_of_what_they_are_of():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    plan = cast_plan(model, bf16, keep_fp32="1")
    apply(plan)
    x = activation(2, 4).requires_grad_()

    with fp32_boundaries(model, plan):
        model(x).float().square().sum().backward()

    assert x.grad.dtype == bf16
    assert [p.grad.dtype for p in model.parameters()] == [bf16, bf16, fp32, fp32, bf16, bf16]
    assert all(p.grad.abs().sum() > 0 for p in (x, *model.parameters()))


@pytest.mark.parametrize(("given", "returned"), [(bf16, bf16), (fp16, fp16), (fp32, fp32)])
def test_what_comes_in_decides_what_goes_out(given, returned):
    model, plan = pinned(nn.Linear(4, 4))

    with fp32_boundaries(model, plan):
        assert model(torch.randn(2, 4).to(given)).dtype == returned


def test_the_activation_is_what_the_forward_names_first_in_whatever_order_it_is_given():
    model, plan = pinned(Promoting())
    apply(plan)

    with fp32_boundaries(model, plan):
        assert model[0](shift=torch.ones(4), x=activation(2, 4)).dtype == bf16
        assert model[0](shift=activation(2, 4), x=torch.ones(4)).dtype == fp32


def test_keywords_and_nested_outputs_pass_through():
    model, plan = pinned(Promoting())
    apply(plan)

    with fp32_boundaries(model, plan):
        output, more = model[0](activation(4), shift=activation(4), twice=True)

    assert (output.dtype, more["again"].dtype) == (bf16, bf16)
    assert more["count"].dtype == torch.int64


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copied_model_has_boundaries_of_its_own(copied):
    model, plan = pinned(nn.Linear(4, 4))
    apply(plan)
    handle = fp32_boundaries(model, plan)
    x = activation(2, 4)
    expected = model(x)

    twin = copied(model)
    with torch.no_grad():
        model[0].weight.zero_()
    handle.remove()

    assert torch.equal(twin(x), expected)
    assert twin[0].forward.module is twin[0]


def test_boundaries_go_when_the_block_ends_in_an_error():
    model, plan = pinned(nn.Linear(4, 4))

    with pytest.raises(KeyError), fp32_boundaries(model, plan):
        raise KeyError
    assert "forward" not in vars(model[0])


def test_removing_again_is_no_error():
    model, plan = pinned(nn.Linear(4, 4))
    handle = fp32_boundaries(model, plan)

    handle.remove()
    handle.remove()

    assert "forward" not in vars(model[0])


def test_a_forward_of_the_object_s_own_is_called_and_comes_back():
    model, plan = pinned(nn.Linear(4, 4))
    seen, forward = [], model[0].forward

    def own(x):
        seen.append(x.dtype)
        return forward(x)

    model[0].forward = own
    with fp32_boundaries(model, plan):
        model(activation(2, 4))

    assert seen == [fp32]
    assert model[0].forward is own


def test_a_forward_replaced_since_is_an_error_and_nothing_is_removed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    handle = fp32_boundaries(model, cast_plan(model, bf16, keep_fp32=["0", "1"]))
    mine, model[1].forward = model[1].forward, lambda x: x

    with pytest.raises(PatchError, match=r"1 modules[\s\S]*  1\n"):
        handle.remove()
    assert "forward" in vars(model[0])

    model[1].forward = mine
    handle.remove()
    assert not any("forward" in vars(layer) for layer in model)


def test_nested_boundaries_are_removed_from_the_inside():
    model, plan = pinned(nn.Linear(4, 4))
    outer = fp32_boundaries(model, plan)
    inner = fp32_boundaries(model, plan)

    with pytest.raises(PatchError):
        outer.remove()
    inner.remove()
    outer.remove()

    assert "forward" not in vars(model[0])


@pytest.mark.usefixtures("_dynamo")
def test_a_wrapped_owner_gets_one_boundary():
    model, plan = pinned(torch.compile(nn.Linear(4, 4), backend="eager"))

    assert fp32_boundaries(model, plan).names == ("0",)


# As the dense layers of T5: the activation is cast to the dtype of the weight that comes next.
class CastsToItsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.wo(self.wi(x).to(self.wo.weight.dtype))


def test_a_module_that_hands_on_the_float32_of_a_pin_in_it_gets_a_boundary_for_what_comes_out():
    model = nn.Sequential(CastsToItsWeight(), nn.Linear(4, 2))
    plan = cast_plan(model, bf16, keep_fp32="0.wo")
    apply(plan)
    x, seen = activation(2, 4).requires_grad_(), []
    model[0].wi.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    expected = model[0](x).to(bf16)

    with fp32_boundaries(model, plan) as handle:
        output = model[0](x)
        model(x).sum().backward()
        wide = model[0].wo(x.float())

    assert handle.names == ("0", "0.wo")
    assert any(note.startswith("'0' (CastsToItsWeight) needs") for note in plan.notes)
    assert (output.dtype, wide.dtype) == (bf16, fp32)
    assert torch.equal(output, expected)
    assert set(seen) == {bf16}
    assert [p.grad.dtype for p in model[0].parameters()] == [bf16, bf16, fp32, fp32]


def test_a_module_around_that_deals_with_it_gets_none():
    class CastsBack(CastsToItsWeight):
        def forward(self, x):
            return super().forward(x).to(x.dtype)

    model = nn.Sequential(CastsBack())

    assert fp32_boundaries(model, cast_plan(model, bf16, keep_fp32="0.wo")).names == ("0.wo",)


def test_pins_that_do_not_fit_the_other_tensors_are_noted_and_get_none():
    model = nn.Sequential(nn.Linear(4, 4))
    plan = cast_plan(model, bf16, keep_fp32="0.weight")
    apply(plan)

    assert any("pin all of its tensors or none" in note for note in plan.notes)
    assert fp32_boundaries(model, plan).names == ()
    for x in (activation(2, 4), torch.randn(2, 4)):
        with pytest.raises(RuntimeError):
            model(x)


def test_a_trial_runs_no_hooks_and_no_forward_of_an_object_s_own():
    model = nn.Sequential(CastsToItsWeight())
    plan = cast_plan(model, bf16, keep_fp32="0.wo")
    called = []
    for module in model.modules():
        module.register_forward_hook(lambda *a: called.append(a))
        module.register_forward_pre_hook(lambda *a, **k: called.append(a), with_kwargs=True)
    model[0].wi.forward = called.append

    again = cast_plan(model, bf16, keep_fp32="0.wo")

    assert again.notes == plan.notes
    assert called == []


@EACH
def test_inside_a_boundary_autocast_is_off(make, sample):
    model, plan = pinned(make())
    apply(plan)
    x = sample()

    with fp32_boundaries(model, plan):
        expected = model(x)
        with torch.autocast("cpu", dtype=bf16):
            output = model(x)

    assert torch.equal(output, expected)


def test_a_boundary_of_what_comes_out_alone_leaves_autocast_on():
    model = nn.Sequential(CastsToItsWeight())
    plan = cast_plan(model, bf16, keep_fp32="0.wo")
    apply(plan)

    with fp32_boundaries(model, plan), torch.autocast("cpu", dtype=bf16):
        assert model(torch.randn(2, 4)).dtype == fp32
        assert model[0].wi(torch.randn(2, 4)).dtype == bf16


@pytest.mark.usefixtures("_dynamo")
@pytest.mark.parametrize("autocast", [False, True])
def test_a_boundary_is_compiled_into_one_graph(autocast):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    plan = cast_plan(model, bf16, keep_fp32=["1", "2"])
    apply(plan)
    x = activation(2, 4)

    with fp32_boundaries(model, plan), torch.autocast("cpu", dtype=bf16, enabled=autocast):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), model(x))
