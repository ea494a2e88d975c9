from __future__ import annotations

import pytest
import torch
from torch import nn

from automodel_fn import ConfigError, apply, bf16, cast_plan, fp16, fp32, frozen_cast_plan


class Adapted(nn.Module):
    """A frozen linear with a trainable adapter beneath it, as LoRA makes them."""

    def __init__(self):
        super().__init__()
        self.base = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.register_buffer("scale", torch.ones(2))
        self.own_adapter = nn.Parameter(torch.ones(2, 1))
        self.adapter = nn.Linear(2, 2, bias=False)


def make():
    tower = nn.ModuleDict({"proj": nn.Linear(2, 2), "norm": nn.LayerNorm(2)}).requires_grad_(False)
    tower.register_buffer("table", torch.ones(2))
    tower.register_buffer("inv_freq", torch.ones(2), persistent=False)
    body = nn.ModuleDict({"adapted": Adapted(), "mlp": nn.Linear(2, 2)})
    body.register_buffer("body_table", torch.ones(2))
    return nn.ModuleDict({"tower": tower, "body": body})


TOWER = {"tower.proj.weight", "tower.proj.bias", "tower.norm.weight", "tower.norm.bias"}
TOWER_BUFFERS = {"tower.table", "tower.inv_freq"}
BASE = {"body.adapted.base", "body.adapted.scale"}
ADAPTERS = {"body.adapted.own_adapter", "body.adapted.adapter.weight"}


def cast_names(plan):
    return {name for entry in plan.entries for name in entry.names if entry.action == "cast"}


@pytest.mark.parametrize(
    ("mixed", "names"),
    [
        ("base", TOWER | TOWER_BUFFERS | BASE),
        ("all", TOWER | TOWER_BUFFERS | BASE | ADAPTERS),
        ("none", TOWER | TOWER_BUFFERS),
    ],
)
def test_mixed_says_what_of_an_adapted_module_is_cast(mixed, names):
    assert cast_names(frozen_cast_plan(make(), bf16, mixed=mixed)) == names


def test_base_is_the_default():
    model = make()

    assert frozen_cast_plan(model, bf16) == frozen_cast_plan(model, bf16, mixed="base")


@pytest.mark.parametrize("arguments", [{"mixed": "some"}, {"buffers": "some"}])
@pytest.mark.parametrize("dtype", [bf16, None])
def test_other_arguments_are_an_error(arguments, dtype):
    with pytest.raises(ConfigError, match="='some'"):
        frozen_cast_plan(make(), dtype, **arguments)


def test_another_dtype_is_an_error():
    with pytest.raises(ConfigError, match="compute_dtype=float64"):
        frozen_cast_plan(make(), torch.float64)


@pytest.mark.parametrize(
    ("buffers", "names"),
    [("all", TOWER_BUFFERS), ("persistent", {"tower.table"}), ("none", set())],
)
def test_buffers_says_which_buffers_of_frozen_parts_are_cast(buffers, names):
    plan = frozen_cast_plan(make(), bf16, mixed="none", buffers=buffers)

    assert cast_names(plan) - TOWER == names


def test_all_buffers_are_the_default():
    model = make()

    assert frozen_cast_plan(model, bf16) == frozen_cast_plan(model, bf16, buffers="all")


@pytest.mark.parametrize("mixed", ["base", "all", "none"])
def test_a_trainable_model_is_left_alone(mixed):
    assert cast_names(frozen_cast_plan(make().requires_grad_(True), bf16, mixed=mixed)) == set()


@pytest.mark.parametrize("mixed", ["base", "all", "none"])
def test_a_frozen_model_is_cast_whole(mixed):
    plan = frozen_cast_plan(make().requires_grad_(False), bf16, mixed=mixed)

    assert {entry.action for entry in plan.entries} == {"cast"}
    assert all("the model is frozen" in entry.reason for entry in plan.entries)


def test_the_reason_names_the_largest_frozen_part(entry_of):
    plan = frozen_cast_plan(make(), bf16)

    assert entry_of(plan, "tower.proj.weight").reason == "in the frozen part 'tower'"
    assert "mixed module 'body.adapted'" in entry_of(plan, "body.adapted.base").reason
    assert "trainable" in entry_of(plan, "body.mlp.weight").reason


def test_a_module_of_buffers_alone_is_no_frozen_part(make_holder):
    model = nn.ModuleDict({"rope": make_holder(inv_freq=torch.ones(2)), "mlp": nn.Linear(2, 2)})

    assert cast_names(frozen_cast_plan(model, bf16)) == set()


def test_a_module_of_buffers_inside_a_frozen_part_is_cast_with_it(make_holder):
    frozen = nn.ModuleDict({"rope": make_holder(inv_freq=torch.ones(2)), "mlp": nn.Linear(2, 2)})
    model = nn.ModuleDict({"tower": frozen.requires_grad_(False), "head": nn.Linear(2, 2)})

    assert "tower.rope.inv_freq" in cast_names(frozen_cast_plan(model, bf16))


@pytest.mark.parametrize("attribute", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
def test_declared_pins_stay(attribute, entry_of):
    model = make()
    setattr(model, attribute, ["norm"])

    plan = frozen_cast_plan(model, bf16)

    assert entry_of(plan, "tower.norm.weight").action == "keep"
    assert cast_names(plan) == (TOWER | TOWER_BUFFERS | BASE) - {
        "tower.norm.weight",
        "tower.norm.bias",
    }


@pytest.mark.parametrize("mixed", ["base", "all"])
def test_a_module_whose_only_frozen_tensors_are_pins_is_not_mixed(mixed):
    model = nn.ModuleDict({"norm": nn.LayerNorm(2)})
    model["norm"].bias.requires_grad_(False)
    model._keep_in_fp32_modules = ["norm.bias"]

    assert cast_names(frozen_cast_plan(model, bf16, mixed=mixed)) == set()


def tied(is_frozen):
    model = nn.ModuleDict({"tower": nn.Embedding(3, 2), "head": nn.Linear(2, 3)})
    model["head"].weight = model["tower"].weight
    model["tower"].requires_grad_(not is_frozen)
    return model


def test_a_frozen_tensor_tied_into_a_trained_module_is_cast_with_its_frozen_part(entry_of):
    entry = entry_of(frozen_cast_plan(tied(True), bf16, mixed="none"), "tower.weight")

    assert (entry.names, entry.action) == (("tower.weight", "head.weight"), "cast")


def test_a_trained_tensor_is_in_no_frozen_part_under_any_name():
    model = tied(False)
    model["head"].bias.requires_grad_(False)

    assert cast_names(frozen_cast_plan(model, bf16)) == {"head.bias"}


@pytest.mark.parametrize("mixed", ["base", "all", "none"])
def test_frozen_tensors_that_no_cast_touches_do_not_make_a_module_mixed(mixed, make_holder):
    frozen = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)
    model = nn.ModuleDict({"m": make_holder(wide=frozen, adapter=nn.Parameter(torch.ones(2)))})

    assert cast_names(frozen_cast_plan(model, bf16, mixed=mixed)) == set()


def test_what_no_cast_touches_is_left_alone_in_frozen_parts(zoo, left_alone, entry_of):
    plan = frozen_cast_plan(zoo.requires_grad_(False), bf16)

    assert {entry_of(plan, n).action for n in (*left_alone, "four_bits")} == {"skip"}


def test_no_compute_dtype_plans_nothing():
    plan = frozen_cast_plan(make(), None)

    assert {entry.action for entry in plan.entries} == {"skip"}
    assert plan.dtype is None
    assert len(plan.entries) == len(cast_plan(make(), bf16).entries)


@pytest.mark.parametrize("dtype", [bf16, fp16])
def test_trainable_weights_and_their_bits_survive_the_apply(dtype, state_of):
    model = make()
    before = state_of(model)

    apply(frozen_cast_plan(model, dtype))

    assert set(state_of(model).differences(before)) == TOWER | TOWER_BUFFERS | BASE
    assert model["tower"]["proj"].weight.dtype == dtype
    assert model["body"]["mlp"].weight.dtype == fp32
