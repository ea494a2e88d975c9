import attrs
import pytest

from automodel_fn.bench import Benchmark, Case, Measure, Measured, Subject, run_benchmark
from automodel_fn.bench import _runner as runner
from automodel_fn.bench import _worker as worker

ENVIRONMENT = {
    **dict.fromkeys(("python", "torch", "platform", "device"), "x"),
    **{"num_threads": 1, "num_cpus": 1, "free_bytes": None, "packages": {}},
}


def case(name, batch):
    return Case(name, device="cpu", description="", parameters={}, needed_bytes=0, batch=batch)


def measured(case, names):
    problems = {"peer": "it raised ValueError: no."} if case.name == "b1" else {}
    return {
        name: Measured({"us": float(index)}, problem=problems.get(name, ""))
        for index, name in enumerate(names)
    }


BENCHMARK = Benchmark(
    "together",
    description="",
    measures=(Measure("us", unit="us", description=""),),
    cases=(case("a1", "a"), case("b1", "b"), case("a2", "a")),
    subjects=(
        Subject("ours", description=""),
        Subject("peer", description="", cases=("a1", "b*")),
        Subject("other", description=""),
    ),
    ours="ours",
    together=measured,
)


class Launch:
    def __init__(self, absent=()):
        self.requests = []
        self._absent = dict(absent)

    def __call__(self, request):
        if "subjects" not in request:
            return {"environment": ENVIRONMENT, "absent": self._absent}
        self.requests.append(request)
        return worker.answer(request)


@pytest.fixture
def run(monkeypatch):
    for module in (runner, worker):
        monkeypatch.setattr(module, "BENCHMARKS", {"together": BENCHMARK})

    def run(rounds=1, launch=None, **arguments):
        return run_benchmark("together", rounds=rounds, launch=launch or Launch(), **arguments)

    return run


def test_a_batch_of_cases_takes_one_process_with_all_subjects(run):
    launch = Launch()
    result = run(launch=launch)

    asked = [(request["cases"], request["subjects"]) for request in launch.requests]
    everyone = ["ours", "peer", "other"]
    assert asked == [(["a1", "a2"], everyone), (["b1"], everyone)]
    assert {m.case for m in result.measurements} == {"a1", "a2", "b1"}


def test_the_order_within_a_process_turns_from_round_to_round(run):
    launch = Launch()
    run(rounds=3, launch=launch, cases="b1")

    assert [request["subjects"][0] for request in launch.requests] == ["ours", "peer", "other"]


def test_a_subject_has_no_part_in_a_case_that_it_is_not_for(run):
    result = run()

    assert [m.subject for m in result.measurements if m.case == "a2"] == ["ours", "other"]
    assert [row.subject for row in result.rows() if row.case == "a2"] == ["ours", "other"]


def test_a_peer_that_could_not_be_measured_is_absent_there_with_its_words(run):
    rows = {(row.case, row.subject): row for row in run().rows()}

    assert rows["b1", "peer"].absent == "it raised ValueError: no."
    assert rows["a1", "peer"].absent == ""
    assert rows["b1", "ours"].summaries[0][1].median == 0.0


def test_a_subject_that_is_absent_is_not_asked_for(run):
    launch = Launch(absent={"peer": "it is not installed."})
    result = run(launch=launch)

    assert all("peer" not in request["subjects"] for request in launch.requests)
    assert [row.case for row in result.rows() if row.absent] == ["a1", "b1"]


def test_progress_is_told_of_each_process(run):
    seen = []
    run(rounds=2, on_progress=seen.append)

    assert [(p.cases, p.num_done, p.num_total) for p in seen] == [
        (("a1", "a2"), 0, 4),
        (("b1",), 1, 4),
        (("a1", "a2"), 2, 4),
        (("b1",), 3, 4),
    ]


def test_subjects_measure_themselves_or_together_and_never_both():
    alone = Subject("alone", description="", measure=lambda case: Measured(()))

    for changes in ({"together": None}, {"subjects": (*BENCHMARK.subjects, alone)}):
        with pytest.raises(AssertionError):
            attrs.evolve(BENCHMARK, **changes)
