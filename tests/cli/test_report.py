import json

import pytest
from torch import nn

from automodel_fn import bf16, cast_plan
from automodel_fn.cli._checks import Check
from automodel_fn.cli._report import TrainReport


@pytest.fixture
def report(settings):
    def make(**fields):
        known = {
            "status": "finished",
            "plan": cast_plan(nn.Linear(2, 2), bf16),
            "versions": (("torch", "2"),),
            "model_name": "Tiny",
        }
        return TrainReport(settings(), **(known | fields))

    return make


def test_json_has_null_where_a_loss_is_no_number(report):
    made = report(losses=(1.5, float("nan"), float("inf")), fixed_loss=(2.0, float("nan")))
    data = json.loads(made.to_json(), parse_constant=pytest.fail)

    assert data["losses"] == [1.5, None, None]
    assert data["fixed_loss"] == {"before": 2.0, "after": None}


def test_only_what_failed_has_failed(report):
    checks = [Check(str(passed), passed=passed, evidence="") for passed in (True, False, None)]

    assert [check.claim for check in report(checks=tuple(checks)).failed] == ["False"]


def test_verdicts_have_their_colors_on_the_page(report):
    checks = [Check("claim", passed=passed, evidence="") for passed in (True, False, None)]
    page = report(checks=tuple(checks)).to_html()

    for kind, verdict in (("ok", "ok"), ("failed", "FAILED"), ("open", "not checked")):
        assert page.count(f'<td class="{kind}">{verdict}</td>') == 1


def test_a_page_without_steps_and_checks_says_so(report):
    page = report(status="running").to_html()

    assert "No optimizer step was completed." in page
    assert "The run ended before its checks." in page
    assert "running: Tiny, 0 of 2 steps" in page


def test_text_of_others_is_escaped_on_the_page(report):
    check = Check("<script>a", passed=True, evidence="<script>b")
    page = report(checks=(check,), model_name="<script>c", losses=(1.0, 0.5)).to_html()

    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 3
