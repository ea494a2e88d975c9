import json

import pytest

from automodel_fn.bench import BENCHMARKS, BenchmarkResult, run_benchmark
from automodel_fn.bench import _launch as launching
from automodel_fn.cli import _bench
from automodel_fn.errors import BenchmarkError

NEMO = "nemo_automodel cast_model_to_dtype"
APPLY_MS = {"automodel_fn": 2.0, "model.to": 4.0}


def measured(request, values, facts):
    (case,), (subject,) = request["cases"], request["subjects"]
    found = {"case": case, "subject": subject, "values": values, "facts": facts}
    return {"measured": [{**found, "problem": ""}]}


@pytest.fixture
def launch(monkeypatch):
    def answer(request):
        if "subjects" in request:
            (subject,) = request["subjects"]
            exact = int(subject == "automodel_fn")
            values = {"plan_ms": None, "apply_ms": APPLY_MS[subject]}
            return measured(request, values, {"cast_exact": 1, "pins_exact": exact})
        names = ("python", "torch", "platform", "device")
        numbers = {"num_threads": 1, "num_cpus": 1, "free_bytes": 2**40, "packages": {}}
        environment = {**dict.fromkeys(names, "x"), **numbers}
        return {"environment": environment, "absent": {NEMO: "it is not installed."}}

    def replace(answer):
        monkeypatch.setattr(
            _bench,
            "run_benchmark",
            lambda name, **given: run_benchmark(name, **given | {"launch": answer}),
        )

    replace(answer)
    return replace


def test_without_a_name_benchmarks_and_cases_are_listed(cli):
    code, out, err = cli("bench")

    assert (code, err) == (0, "")
    for benchmark in BENCHMARKS.values():
        assert benchmark.description in out.replace("\n", " ")
        assert all(case.name in out for case in benchmark.cases)


def test_the_list_is_also_json(cli):
    code, out, err = cli("bench", "--json")

    assert (code, err) == (0, "")
    assert set(json.loads(out)) == set(BENCHMARKS)
    assert {case["device"] for case in json.loads(out)["cast"]["cases"]} == {"cpu", "cuda"}


def test_a_run_is_a_table_with_medians_ratios_pins_and_what_is_absent(cli, launch):
    code, out, err = cli("bench", "cast", "--rounds", "1", "--case", "quick-few")

    assert code == 0
    rows = {line.split()[1]: line for line in out.splitlines() if "quick-few" in line}
    assert "2.0 ms" in rows["automodel_fn"]
    assert rows["automodel_fn"].split()[-1] == "yes"
    assert "4.0 ms (0.50)" in rows["model.to"]
    assert rows["model.to"].split()[-1] == "NO"
    assert "absent" in rows["nemo_automodel"]
    assert f"absent: {NEMO}: it is not installed." in out
    assert err.splitlines() == [
        "1/2 round 1: quick-few, automodel_fn",
        "2/2 round 1: quick-few, model.to",
    ]


def test_json_alone_stands_on_stdout_and_in_the_file(cli, launch, tmp_path):
    path = tmp_path / "result.json"
    code, out, err = cli(
        *("bench", "cast", "--rounds", "2", "--case", "few", "--case", "quick", "--json"),
        *("--out", path),
    )

    assert code == 0
    result = BenchmarkResult.from_json(out)
    assert path.read_text() == out
    assert {m.case for m in result.measurements} == {
        "few",
        "quick-few",
        "quick-few-half-pinned",
        "quick-many",
        "quick-many-half-pinned",
    }
    assert err.count("\n") == 2 * 2 * 5


def test_a_promise_of_ours_that_is_broken_is_exit_code_1(cli, launch):
    def broken(request):
        if "subjects" in request:
            return measured(request, {}, {"pins_exact": 0, "cast_exact": 1})
        names = ("python", "torch", "platform", "device")
        numbers = {"num_threads": 1, "num_cpus": 1, "free_bytes": None, "packages": {}}
        return {"environment": {**dict.fromkeys(names, "x"), **numbers}, "absent": {}}

    launch(broken)
    code, _, err = cli("bench", "cast", "--rounds", "1", "--case", "quick-few")

    assert code == 1
    assert err.endswith("automodel-fn: quick-few: automodel_fn promises pins_exact\n")


def test_a_worker_that_fails_is_exit_code_2_with_its_last_words(cli, launch):
    def failing(request):
        raise launching._failed(request, "ended with exit status 1", "last words")

    launch(failing)
    code, out, err = cli("bench", "cast", "--case", "quick-few")

    assert (code, out) == (2, "")
    assert "last words" in err
    assert "Traceback" not in err
    assert isinstance(launching._failed({}, "", ""), BenchmarkError)


def test_a_result_is_also_written_as_markdown_and_as_a_picture(cli, launch, tmp_path):
    pytest.importorskip("matplotlib")
    markdown, svg = tmp_path / "r.md", tmp_path / "r.svg"
    code, _, _ = cli(
        *("bench", "cast", "--rounds", "1", "--case", "quick-few"),
        *("--markdown", markdown, "--svg", svg),
    )

    assert code == 0
    text = markdown.read_text()
    assert "### quick-few\n\n16 MiB of float32" in text
    assert "| **automodel_fn** | **2.0** |" in text
    assert f"- absent: {NEMO}: it is not installed." in text
    assert "casting, the plan made before, ms" in svg.read_text()


def test_a_stored_result_is_shown_as_it_was_and_nothing_is_measured(cli, launch, tmp_path):
    path = tmp_path / "result.json"
    _, measured_out, _ = cli("bench", "cast", "--rounds", "1", "--case", "few", "--out", path)

    launch(None)
    code, out, err = cli("bench", "--from", path)

    assert (code, out, err) == (0, measured_out, "")


def test_a_file_that_holds_no_result_is_refused(cli, tmp_path):
    path = tmp_path / "result.json"
    path.write_text("{}")
    code, _, err = cli("bench", "--from", path)

    assert code == 2
    assert "expected format='automodel_fn.benchmark/3'" in err
