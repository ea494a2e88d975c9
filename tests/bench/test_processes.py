import importlib.util
import json
import subprocess
import sys

import pytest

from automodel_fn.bench import BENCHMARKS, BenchmarkResult, run_benchmark
from automodel_fn.bench._launch import launch
from automodel_fn.errors import BenchmarkError

HAS_NEMO = importlib.util.find_spec("nemo_automodel") is not None
NEMO = "nemo_automodel cast_model_to_dtype"


@pytest.mark.slow
def test_the_quick_case_runs_for_real():
    result = run_benchmark("cast", rounds=2, cases="quick-few-half-pinned")

    rows = {row.subject: row for row in result.rows()}
    assert dict(rows["automodel_fn"].facts) == {"cast_exact": 1, "pins_exact": 1, "num_pins": 4}
    assert dict(rows["model.to"].facts) == {"cast_exact": 1, "pins_exact": 0, "num_pins": 4}
    assert all(row.broken_claims == () for row in rows.values())
    assert bool(rows[NEMO].absent) is not HAS_NEMO
    for measurement in result.measurements:
        values = dict(measurement.values)
        assert values["apply_ms"] > 0
        assert (values["plan_ms"] is None) is (measurement.subject != "automodel_fn")
        assert values["extra_peak_mib"] is None or 0 <= values["extra_peak_mib"] < 64
    assert BenchmarkResult.from_json(result.to_json()) == result


@pytest.mark.slow
@pytest.mark.skipif(HAS_NEMO, reason="nemo_automodel is installed")
def test_a_peer_that_is_not_installed_is_reported_by_the_worker():
    report = launch({"benchmark": "cast", "device": "cpu"})

    assert "No module named 'nemo_automodel'" in report["absent"][NEMO]
    assert report["environment"]["packages"] == {"nemo-automodel": None}
    assert report["environment"]["torch"]


@pytest.mark.slow
def test_a_worker_that_fails_is_an_error_with_its_last_lines():
    request = {"benchmark": "cast", "device": "cpu", "cases": ["quick-few"], "subjects": ["nobody"]}

    with pytest.raises(BenchmarkError) as caught:
        launch(request)

    message = str(caught.value)
    assert "exit status 1" in message
    assert "subject='nobody' is unknown; there are: automodel_fn, model.to" in message
    assert "python -m automodel_fn.bench._worker" in message


@pytest.mark.slow
def test_what_a_worker_prints_beside_its_answer_does_not_reach_the_standard_output():
    code = (
        "from automodel_fn.bench import _worker\n"
        "_worker.answer = lambda request: print('noise') or {'values': {}}\n"
        "_worker.main(['{}'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert json.loads(done.stdout) == {"values": {}}
    assert done.stderr == "noise\n"


def test_benchmarks_cannot_be_changed():
    with pytest.raises(TypeError):
        BENCHMARKS["other"] = BENCHMARKS["cast"]


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=BENCHMARKS.keys())
def test_every_benchmark_is_whole(benchmark):
    subjects = [subject.name for subject in benchmark.subjects]
    cases = [(case.device, case.name) for case in benchmark.cases]

    assert benchmark.ours in subjects
    assert len(set(subjects)) == len(subjects)
    assert len(set(cases)) == len(cases)
    devices = {case.device for case in benchmark.cases}
    assert devices
    for device in devices:
        groups = {case.group for case in benchmark.cases if case.device == device}
        assert groups >= {"full", "quick"}
    assert benchmark.conditions
