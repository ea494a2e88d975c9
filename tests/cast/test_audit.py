from __future__ import annotations

import pytest
import torch
from torch import nn

from automodel_fn import ConfigError, apply, audit, bf16, cast_plan, fp32


def whats(findings):
    return {(finding.name, finding.what) for finding in findings}


@pytest.fixture
def cast():
    model = nn.ModuleDict({"mlp": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    model.register_buffer("table", torch.ones(2))
    plan = cast_plan(model, bf16, keep_fp32="norm")
    return model, plan, apply(plan, checksum=True)


def test_a_model_that_is_as_planned_has_no_findings(cast):
    model, plan, report = cast

    assert audit(model, plan) == audit(model, report) == audit(model, report, bits=True) == ()


def test_every_kind_of_tensor_can_be_audited(zoo):
    report = apply(cast_plan(zoo, bf16), checksum=True)

    assert audit(zoo, report, bits=True) == ()


def test_a_model_before_its_cast_is_not_as_planned(zoo):
    plan = cast_plan(zoo, bf16)

    changing = {(entry.name, "dtype") for entry in plan.entries if entry.changes}
    assert whats(audit(zoo, plan)) == changing


def test_a_finding_says_what_was_expected_and_what_is_there(cast):
    model, plan, _ = cast
    model["norm"].to(bf16)

    assert [str(f) for f in audit(model, plan)] == [
        "norm.weight: dtype should be float32, found bfloat16",
        "norm.bias: dtype should be float32, found bfloat16",
    ]


def freeze(model):
    model["mlp"].bias.requires_grad_(False)


def reshape(model):
    model["mlp"].bias = nn.Parameter(torch.ones(3, dtype=bf16))


def tie(model):
    model["norm"].bias = model["norm"].weight


def remove(model):
    model["mlp"].bias = None


def add(model):
    model["mlp"].register_buffer("more", torch.ones(1))


def make_fleeting(model):
    model.register_buffer("table", model.table, persistent=False)


def widen(model):
    model["mlp"].weight.data = model["mlp"].weight.data.float()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (freeze, {("mlp.bias", "requires_grad")}),
        (reshape, {("mlp.bias", "shape")}),
        (tie, {("norm.weight", "names"), ("norm.bias", "names")}),
        (remove, {("mlp.bias", "presence")}),
        (add, {("mlp.more", "presence")}),
        (make_fleeting, {("table", "kind")}),
        (widen, {("mlp.weight", "dtype")}),
    ],
)
def test_each_difference_is_found_and_named(cast, change, found):
    model, plan, _ = cast
    change(model)

    assert whats(audit(model, plan)) == found


def test_all_differences_are_found_at_once(cast):
    model, plan, _ = cast
    freeze(model)
    widen(model)
    add(model)

    assert len(audit(model, plan)) == 3


@pytest.mark.parametrize("value", [-0.0, 1.0])
def test_one_changed_bit_is_found_by_its_checksum(cast, value):
    model, _, report = cast
    with torch.no_grad():
        model["norm"].bias[1] = value

    assert whats(audit(model, report, bits=True)) == {("norm.bias", "bits")}
    assert audit(model, report) == ()


def test_every_bit_of_every_kind_is_under_the_checksum(zoo, left_alone):
    report = apply(cast_plan(zoo, bf16), checksum=True)
    named = {entry.name for entry in report.entries}

    assert {name for name, _ in report.checksums} == named
    for name in left_alone:
        buffer = getattr(zoo, name)
        buffer.view(torch.uint8)[0] ^= 1
    assert whats(audit(zoo, report, bits=True)) == {(name, "bits") for name in left_alone}


def test_bits_need_a_report_with_checksums(cast):
    model, plan, _ = cast

    with pytest.raises(ConfigError, match="checksum=True"):
        audit(model, plan, bits=True)
    with pytest.raises(ConfigError, match="checksum=True"):
        audit(model, apply(plan.inverse()), bits=True)


@pytest.mark.parametrize("wrong", [None, "plan", ()])
def test_what_is_neither_plan_nor_report_is_refused(cast, wrong):
    with pytest.raises(ConfigError, match="CastPlan"):
        audit(cast[0], wrong)


def test_an_audit_reads_only(zoo, state_of):
    report = apply(cast_plan(zoo, bf16), checksum=True)
    before = state_of(zoo)

    audit(zoo, report, bits=True)

    assert state_of(zoo).differences(before) == []


def test_a_meta_model_can_be_audited():
    model = nn.Linear(2, 2, device="meta")
    report = apply(cast_plan(model, bf16), checksum=True)

    assert audit(model, report, bits=True) == ()
    assert audit(model.to(fp32), report) != ()
