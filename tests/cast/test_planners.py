from __future__ import annotations

import random
import warnings

import numpy
import pytest
import torch
from torch import nn

from automodel_fn import ConfigError, bf16, cast_plan, fp16, fp32


def stack():
    layers = [nn.ModuleDict({"mlp": nn.Linear(2, 2), "norm": nn.LayerNorm(2)}) for _ in range(3)]
    return nn.ModuleDict({"layers": nn.ModuleList(layers), "head": nn.Linear(2, 2, bias=False)})


@pytest.mark.parametrize(
    ("buffers", "persistent", "fleeting"),
    [("persistent", bf16, fp32), ("all", bf16, bf16), ("none", fp32, fp32)],
)
def test_buffers_says_which_buffers_are_cast(zoo, entry_of, buffers, persistent, fleeting):
    plan = cast_plan(zoo, bf16, buffers=buffers)

    assert entry_of(plan, "blocks.0.table").to_dtype == persistent
    assert entry_of(plan, "blocks.1.inv_freq").to_dtype == fleeting
    assert entry_of(plan, "special").to_dtype == bf16


def test_persistent_buffers_are_the_default(zoo):
    assert cast_plan(zoo, bf16) == cast_plan(zoo, bf16, buffers="persistent")


def test_other_buffers_are_an_error(zoo):
    with pytest.raises(ConfigError, match="buffers='some'"):
        cast_plan(zoo, bf16, buffers="some")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bf16", bf16), ("bfloat16", bf16), ("torch.bfloat16", bf16), ("fp16", fp16), ("half", fp16),
     ("float16", fp16), ("fp32", fp32), ("float32", fp32), ("float", fp32)],
)  # fmt: skip
def test_a_dtype_may_be_given_by_name(zoo, name, dtype):
    assert cast_plan(zoo, name) == cast_plan(zoo, dtype)
    assert cast_plan(zoo, name).dtype == dtype


@pytest.mark.parametrize(
    "wrong",
    [
        "bf17",
        "",
        "nn",
        "Tensor",
        16,
        None,
        torch.float64,
        torch.int8,
        torch.complex64,
        "float8_e4m3fn",
    ],
)
def test_another_dtype_is_an_error(zoo, wrong):
    with pytest.raises(ConfigError, match="dtype="):
        cast_plan(zoo, wrong)


@pytest.mark.parametrize("dtype", [bf16, fp16, fp32])
def test_only_the_three_float_dtypes_are_cast_from(zoo, left_alone, entry_of, dtype):
    plan = cast_plan(zoo, dtype, buffers="all")

    for name in (*left_alone, "four_bits"):
        entry = entry_of(plan, name)
        assert (entry.action, entry.to_dtype) == ("skip", entry.from_dtype)
        assert "left as it is" in entry.reason
    for name in ("special", "fp16", "bf16", "scalar", "empty", "transposed"):
        assert entry_of(plan, name).to_dtype == dtype


def test_what_is_already_right_is_skipped_and_says_so(zoo, entry_of):
    entry = entry_of(cast_plan(zoo, bf16), "bf16")

    assert (entry.action, entry.reason) == ("skip", "already bfloat16")


def test_a_sparse_tensor_is_left_alone(make_holder):
    (entry,) = cast_plan(make_holder(table=torch.eye(2).to_sparse()), bf16).entries

    assert entry.action == "skip"


@pytest.mark.parametrize("name", ["left", "right"])
@pytest.mark.parametrize(("argument", "action"), [("keep_fp32", "keep"), ("skip", "skip")])
def test_tensors_that_share_a_storage_are_decided_together(zoo, entry_of, name, argument, action):
    plan = cast_plan(zoo, bf16, **{argument: name})

    entries = [entry_of(plan, other) for other in ("left", "right")]
    assert [entry.action for entry in entries] == [action] * 2
    assert all(f"{argument}={name!r}" in entry.reason for entry in entries)


def test_of_tensors_that_share_a_storage_skip_is_stronger_than_a_pin(make_holder, actions_of):
    flat = torch.ones(4, dtype=bf16)
    model = make_holder(left=nn.Parameter(flat[:2]), right=nn.Parameter(flat[2:]))

    plan = cast_plan(model, fp16, keep_fp32="left", skip="right")

    assert actions_of(plan) == {"left": "skip", "right": "skip"}


def test_tensors_that_share_a_storage_are_a_note(zoo):
    assert "left, right share one storage and are cast together" in cast_plan(zoo, bf16).notes


def test_a_buffer_follows_the_parameter_whose_storage_it_reads(make_holder, entry_of):
    weight = nn.Parameter(torch.ones(4))
    model = make_holder(weight=weight)
    model.register_buffer("view", weight.detach()[1:], persistent=False)

    assert entry_of(cast_plan(model, bf16), "view").to_dtype == bf16


def test_a_storage_that_is_read_in_two_dtypes_is_left_alone(make_holder):
    weight = nn.Parameter(torch.ones(4))
    model = make_holder(weight=weight, as_integers=weight.detach().view(torch.int32))

    plan = cast_plan(model, bf16)

    assert [entry.action for entry in plan.entries] == ["skip", "skip"]
    assert any("several dtypes" in note for note in plan.notes)


def test_a_meta_model_has_the_same_plan():
    with torch.device("meta"):
        twin = stack()

    assert cast_plan(twin, bf16, keep_fp32="*.norm") == cast_plan(stack(), bf16, keep_fp32="*.norm")


def test_planning_is_deterministic(zoo, make_zoo):
    plan = cast_plan(zoo, bf16, keep_fp32="head")

    assert (
        plan
        == cast_plan(zoo, bf16, keep_fp32="head")
        == cast_plan(make_zoo(), bf16, keep_fp32="head")
    )


def test_planning_reads_only(zoo, state_of):
    before, hooks = state_of(zoo), {name: set(vars(m)) for name, m in zoo.named_modules()}

    cast_plan(zoo, bf16, keep_fp32="head")

    assert state_of(zoo).differences(before) == []
    assert {name: set(vars(m)) for name, m in zoo.named_modules()} == hooks


def test_planning_draws_no_random_numbers(zoo):
    before = torch.get_rng_state()

    cast_plan(zoo, bf16, keep_fp32="head")

    assert torch.equal(torch.get_rng_state(), before)


class MakesATensor(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.scale * torch.ones(4, device=x.device)


@pytest.fixture
def _default_dtype():
    yield
    torch.set_default_dtype(fp32)


@pytest.mark.usefixtures("_default_dtype")
@pytest.mark.parametrize("dtype", [bf16, torch.float64])
def test_planning_does_not_depend_on_the_default_dtype(dtype):
    model = nn.Sequential(MakesATensor(), Chance())
    plan = cast_plan(model, bf16, keep_fp32=["0", "1"])
    torch.set_default_dtype(dtype)

    assert cast_plan(model, bf16, keep_fp32=["0", "1"]) == plan
    assert torch.get_default_dtype() == dtype


# What its forward needs of a bf16 activation is decided by chance.
class Chance(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        if torch.rand([]) + random.random() + numpy.random.uniform() < 1.5:
            return x
        return x * self.scale


def test_planning_leaves_no_trace_of_the_random_numbers_that_a_forward_draws():
    model = nn.Sequential(Chance())
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()

    plans = [cast_plan(model, bf16, keep_fp32="0") for _ in range(20)]

    after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    assert torch.equal(after[0], before[0])
    assert after[1:] == before[1:]
    assert all(plan == plans[0] for plan in plans)


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.cache = torch.zeros(3, 4)
        self.caches = [self.cache, {}]
        self.by_name = {"again": self.cache, "length": torch.tensor(2.0)}
        self.lines = (torch.zeros(4).mul(self.scale),)

    def forward(self, x):
        return x * self.scale * float(self.by_name["length"]) * len(self.caches[0])


def test_planning_copies_no_data_of_tensors_that_a_module_holds_unregistered(monkeypatch):
    model, copied, copy = nn.Sequential(Cached()), [], torch.Tensor.__deepcopy__

    def noted(tensor, memo):
        copied.append((tensor.device.type, tensor.dim()))
        return copy(tensor, memo)

    monkeypatch.setattr(torch.Tensor, "__deepcopy__", noted)
    plan = cast_plan(model, bf16, keep_fp32="0")

    assert set(copied) == {("cpu", 0)}
    assert "returns float32" in plan.notes[0]


@pytest.mark.parametrize("several", [lambda o: o, lambda o: [o, None], lambda o: [o.state]])
def test_something_else_than_optimizers_is_an_error_that_says_how(zoo, several):
    optimizer = torch.optim.SGD([zoo.scalar])

    with pytest.raises(ConfigError, match=r"as in optimizers=\[optimizer\]"):
        cast_plan(zoo, bf16, optimizers=several(optimizer))


@pytest.fixture
def _torch_warns_every_time():
    # Else torch warns once a process, and what a test sees depends on those before it.
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@pytest.mark.usefixtures("_torch_warns_every_time")
@pytest.mark.parametrize("action", ["error", "always"])
def test_planning_neither_warns_nor_depends_on_the_warning_filters(action):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter(action)
        plan = cast_plan(nn.Sequential(nn.RMSNorm(4)), bf16, keep_fp32="0")

    assert plan.notes == ()
    assert seen == []


def test_the_order_of_entries_is_that_of_the_model(zoo, tensors_of):
    order = list(
        dict.fromkeys(id(t) for t in tensors_of(zoo).values() if isinstance(t, nn.Parameter))
    )
    held = tensors_of(zoo)

    planned = [id(held[e.name]) for e in cast_plan(zoo, bf16).entries if e.kind == "parameter"]

    assert planned == order
