import torch

from automodel_fn import bf16, cast_plan
from automodel_fn.render import grouped, plan_html, plan_table, summary


def planned():
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])
    return cast_plan(model, bf16, keep_fp32="*.bias")


def test_layers_that_are_alike_share_a_row():
    assert [group.pattern for group in grouped(planned().rows())] == [
        "{0-2}.weight",
        "{0-2}.bias",
    ]


def test_every_tensor_of_a_plan_is_counted_in_its_groups_and_summary():
    plan = planned()

    assert sum(group.count for group in grouped(plan.rows())) == len(plan.entries)
    assert summary(plan.rows()).startswith("6 tensors: 3 cast, 3 keep;")
    assert plan_table(plan).row_count == 2


def test_what_looks_like_html_is_shown_as_text():
    model = torch.nn.ModuleDict({"<script>": torch.nn.Linear(2, 2)})

    assert "<script>" not in plan_html(cast_plan(model, bf16))
