import math

import pytest

from automodel_fn.bench import BenchmarkResult, Promise, run_benchmark
from automodel_fn.bench._promises import outcome_of
from automodel_fn.cli._bench import broken_claims
from automodel_fn.cli._bench_views import result_markdown, result_tables

OURS, FP8, PLAIN = "automodel_fn", "automodel_fn, FP8", "Hugging Face"
SPEEDS = {OURS: 130.0, FP8: 140.0, PLAIN: 100.0}
PEAKS = {OURS: 18.0, FP8: 21.0, PLAIN: 23.5}
NUMBERS = {"num_threads": 1, "num_cpus": 1, "free_bytes": None, "packages": {}}
TEXTS = dict.fromkeys(("python", "torch", "platform", "device"), "x")


def launch(request):
    if "subjects" not in request:
        return {"environment": {**TEXTS, **NUMBERS}, "absent": {}}
    (case,), (subject,) = request["cases"], request["subjects"]
    values = {"throughput_tps": SPEEDS.get(subject), "peak_gib": PEAKS.get(subject)}
    facts = {"is_loss_of_plain": 1}
    found = {"case": case, "subject": subject, "values": values, "facts": facts, "problem": ""}
    return {"measured": [found]}


@pytest.fixture
def result(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    given = {"device": "cuda", "rounds": 2, "launch": launch, "date": "2026-11-25"}
    return run_benchmark("train-step", cases=("llama", "quick-llama"), **given)


def rows_of(result, case):
    return {row.subject: row for row in result.rows() if row.case == case}


def test_a_promise_of_a_ratio_is_judged_by_the_rounds_that_both_have():
    promise = Promise("throughput_tps", at_least=2, peer="plain")
    mine, peers = {1: 10.0, 2: 1.0, 3: 60.0}, {1: 4.0, 3: 30.0}

    outcome = outcome_of(promise, mine, peers)
    assert outcome.is_kept
    assert outcome.text == "throughput_tps 2.25 times that of plain, at least 2"


@pytest.mark.parametrize(
    ("bounds", "is_kept"),
    [
        ({"at_least": 3}, True),
        ({"at_least": 3.001}, False),
        ({"at_most": 3}, True),
        ({"at_most": 2.999}, False),
        ({"at_least": 1, "at_most": 5}, True),
        ({"at_least": 4, "at_most": 5}, False),
        ({"at_least": 1, "at_most": 2}, False),
        ({"at_most": -math.inf}, False),
    ],
)
def test_bounds_are_of_the_median_and_include_it(bounds, is_kept):
    assert outcome_of(Promise("x", **bounds), {1: 1.0, 2: 3.0, 3: 9.0}, {}).is_kept is is_kept


@pytest.mark.parametrize(
    ("peer", "mine", "peers"),
    [("", {}, {}), ("", {1: None}, {}), ("plain", {1: 1.0}, {}), ("plain", {1: 1.0}, {1: None})],
)
def test_what_was_not_measured_keeps_and_breaks_nothing(peer, mine, peers):
    assert outcome_of(Promise("x", at_least=1, peer=peer), mine, peers) is None


def test_rows_say_what_became_of_each_promise(result):
    rows = rows_of(result, "llama")

    assert [p.text for p in rows[OURS].promises] == [
        "throughput_tps 1.3 times that of Hugging Face, at least 1.22",
        "peak_gib 18, at most 18.5",
    ]
    assert rows[OURS].broken_claims == ()
    assert rows[FP8].broken_claims == (
        "throughput_tps 1.4 times that of Hugging Face, at least 1.48",
        "peak_gib 21, at most 20.5",
    )
    assert rows[PLAIN].promises == ()


def test_a_promise_holds_for_its_cases_only(result):
    assert all(row.promises == () for row in rows_of(result, "quick-llama").values())


def test_a_variant_of_ours_is_ours(result):
    rows = rows_of(result, "llama")

    assert [name for name, row in rows.items() if row.is_ours] == [OURS, FP8]
    assert rows[FP8].ratios == ()
    assert dict(rows[PLAIN].ratios)["peak_gib"].median == 18.0 / 23.5


def test_json_holds_the_promises(result):
    again = BenchmarkResult.from_json(result.to_json())

    assert again == result
    assert again.rows() == result.rows()


def test_broken_promises_are_said_by_the_command(result):
    assert broken_claims(result) == (
        "llama: automodel_fn, FP8 promises "
        "throughput_tps 1.4 times that of Hugging Face, at least 1.48, peak_gib 21, at most 20.5",
    )


def test_views_show_kept_and_broken_promises(result):
    kept = "llama, automodel_fn: peak_gib 18, at most 18.5: kept"
    broken = "llama, automodel_fn, FP8: peak_gib 21, at most 20.5: NOT KEPT"

    for text in (result_markdown(result), str(result_tables(result)[0].caption)):
        assert kept in text
        assert broken in text
