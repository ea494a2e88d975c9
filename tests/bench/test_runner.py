import attrs
import pytest
import torch

from automodel_fn.bench import BENCHMARKS, BenchmarkResult, run_benchmark
from automodel_fn.errors import ConfigError

NEMO = "nemo_automodel cast_model_to_dtype"
ENVIRONMENT = {
    "python": "3.11.7",
    "torch": "2.13.0",
    "platform": "Linux",
    "device": "a processor",
    "num_threads": 2,
    "num_cpus": 2,
    "free_bytes": 2**40,
    "packages": {"nemo-automodel": None},
}
ABSENT = {NEMO: "it cannot be imported: No module named 'nemo_automodel'; install it."}
TIMES = {"automodel_fn": (2.0, 30.0, 4.0), "model.to": (4.0, 60.0, 2.0), NEMO: (8.0, 8.0, 8.0)}


class Answers:
    def __init__(self, absent=(), pins_exact=1, **environment):
        self.requests = []
        self._absent = dict(absent)
        self._facts = {"cast_exact": 1, "pins_exact": pins_exact}
        self._environment = ENVIRONMENT | environment

    def __call__(self, request):
        if "subjects" not in request:
            return {"environment": self._environment, "absent": self._absent}
        (subject,), (case,) = request["subjects"], request["cases"]
        done = self.requests.count((case, subject))
        self.requests.append((case, subject))
        values = {"plan_ms": None, "apply_ms": TIMES[subject][done], "extra_peak_mib": 0.0}
        found = {"case": case, "subject": subject, "values": values, "facts": self._facts}
        return {"measured": [{**found, "problem": ""}]}


def run(answers, **arguments):
    return run_benchmark("cast", launch=answers, date="2026-11-24", **arguments)


def rows_of(result, case):
    return {row.subject: row for row in result.rows() if row.case == case}


def test_every_round_runs_every_subject_before_the_next_begins():
    answers = Answers()
    result = run(answers, rounds=2, cases=("few", "many"))

    rounds = [m.round for m in result.measurements]
    assert rounds == sorted(rounds)
    for number in (1, 2):
        measured = {(m.case, m.subject) for m in result.measurements if m.round == number}
        assert measured == {(case, subject) for case in ("few", "many") for subject in TIMES}
    assert answers.requests == [(m.case, m.subject) for m in result.measurements]


@pytest.mark.parametrize("subjects", ["model.to", ["model.*"], ["automodel_fn", "model.to"]])
def test_of_the_subjects_those_asked_for_and_ours_are_measured(subjects):
    result = run(Answers(), rounds=1, cases="few", subjects=subjects)

    chosen = ("automodel_fn", "model.to")
    assert {m.subject for m in result.measurements} == set(chosen)
    assert tuple(subject.name for subject in result.subjects) == chosen
    assert set(rows_of(result, "few")) == set(chosen)


def test_a_subject_that_is_absent_and_not_asked_for_is_not_told():
    assert run(Answers(ABSENT), rounds=1, cases="few", subjects="model.to").absent == ()
    (absence,) = run(Answers(ABSENT), rounds=1, cases="few").absent
    assert absence.name == NEMO


def test_a_subject_that_there_is_not_is_an_error_that_lists_those_that_there_are():
    with pytest.raises(ConfigError, match=r"subject='modle' matches no subject.*model\.to"):
        run(Answers(), rounds=1, subjects="modle")


def test_the_order_of_subjects_turns_from_round_to_round():
    result = run(Answers(), rounds=3, cases="few")

    firsts = [m.subject for m in result.measurements][::3]
    assert set(firsts) == set(TIMES)


def test_rows_hold_medians_and_our_ratio_to_each_peer():
    rows = rows_of(run(Answers(), rounds=3, cases="few"), "few")

    ours, model_to = rows["automodel_fn"], rows["model.to"]
    assert ours.is_ours
    assert ours.ratios == ()
    assert dict(ours.summaries)["apply_ms"].median == 4.0
    assert dict(model_to.ratios)["apply_ms"].median == 0.5
    assert dict(model_to.ratios)["apply_ms"].maximum == 2.0
    assert dict(model_to.ratios)["plan_ms"] is None
    assert dict(model_to.ratios)["extra_peak_mib"] is None
    assert [name for name, _ in ours.summaries] == [m.name for m in BENCHMARKS["cast"].measures]


def test_a_claim_that_does_not_hold_shows_in_the_row():
    rows = rows_of(run(Answers(pins_exact=0), rounds=1, cases="few"), "few")

    assert rows["automodel_fn"].broken_claims == ("pins_exact",)
    assert rows["model.to"].broken_claims == ()
    assert dict(rows["model.to"].facts)["pins_exact"] == 0


def test_a_peer_that_is_not_installed_is_listed_with_the_reason_and_never_run():
    answers = Answers(absent=ABSENT)
    result = run(answers, rounds=1, cases="few")

    assert [(a.kind, a.name, a.reason) for a in result.absent] == [("subject", NEMO, ABSENT[NEMO])]
    assert rows_of(result, "few")[NEMO].absent == ABSENT[NEMO]
    assert NEMO not in {subject for _, subject in answers.requests}


def test_a_case_without_enough_memory_is_listed_with_the_reason_and_never_run():
    answers = Answers(free_bytes=2**30)
    result = run(answers, rounds=1, cases=("few", "quick-few"))

    assert {case for case, _ in answers.requests} == {"quick-few"}
    (absence,) = result.absent
    assert (absence.kind, absence.name) == ("case", "few")
    assert "2.2 GiB" in absence.reason
    assert "1.0 GiB" in absence.reason
    (row,) = rows_of(result, "few").values()
    assert row.absent == absence.reason


def test_memory_that_nobody_knows_makes_nothing_absent():
    assert run(Answers(free_bytes=None), rounds=1, cases="few").absent == ()


def test_json_holds_all_of_a_result():
    for result in (
        run(Answers(absent=ABSENT), rounds=2),
        run(Answers(pins_exact=None), rounds=1, cases="many*"),
    ):
        assert BenchmarkResult.from_json(result.to_json()) == result
        assert attrs.evolve(result, date="x") != result


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("automodel_fn.benchmark/3", "other/1", "format="),
        ('"rounds": 1', '"rounds": "one"', "result.rounds='one' must be of type int"),
        ('"rounds": 1', '"bounds": 1', "missing or unknown: bounds, rounds"),
        ('"num_cpus": 2', '"num_cpus": null', "result.environment.num_cpus=None"),
        ('"date"', "date", "is no JSON"),
    ],
)
def test_json_that_is_no_result_is_refused_with_the_place(old, new, message):
    text = run(Answers(), rounds=1, cases="few").to_json()
    assert old in text

    with pytest.raises(ConfigError) as caught:
        BenchmarkResult.from_json(text.replace(old, new, 1))

    assert message in str(caught.value)


def test_progress_counts_to_the_last_measurement():
    seen = []
    run(Answers(), rounds=2, cases="few", on_progress=seen.append)

    assert [p.num_done for p in seen] == list(range(6))
    assert {p.num_total for p in seen} == {6}
    assert {(p.round, p.subjects) for p in seen} == {(n, (s,)) for n in (1, 2) for s in TIMES}


def test_the_full_group_runs_unless_cases_are_named():
    cases = {m.case for m in run(Answers(), rounds=1).measurements}

    assert cases == {"few", "few-half-pinned", "many", "many-half-pinned"}


def test_a_date_that_is_not_given_is_taken():
    result = run_benchmark("cast", launch=Answers(), rounds=1, cases="few")

    assert result.date.endswith("+00:00")


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ({"name": "casts"}, ("name='casts'", "cast")),
        ({"cases": "fex"}, ("case='fex'", "few-half-pinned", "quick-many", "full, names, quick")),
        ({"cases": ("few", "zz*")}, ("case='zz*'", "few")),
        ({"device": "tpu"}, ("device='tpu'", "cpu, cuda")),
        ({"rounds": 0}, ("rounds=0", "at least 1")),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(arguments, fragments):
    answers = Answers()

    with pytest.raises(ConfigError) as caught:
        run_benchmark(**({"name": "cast", "launch": answers} | arguments))

    assert all(fragment in str(caught.value) for fragment in fragments)
    assert answers.requests == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(ConfigError, match="use device='cpu'"):
        run(Answers(), device="cuda")
