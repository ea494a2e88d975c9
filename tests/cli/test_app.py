import json

import pytest

import automodel_fn
from automodel_fn.cli import _checks, _train


@pytest.fixture
def tiny(text_file, tmp_path):
    out = tmp_path / "run"
    numbers = [
        "--steps",
        "2",
        "--microbatches",
        "1",
        "--batch-size",
        "1",
        "--seq-len",
        "32",
        "--model",
        "llama",
    ]
    return ("train", *numbers, "--data", text_file, "--out", out)


@pytest.fixture
def forgetful(monkeypatch):
    monkeypatch.setattr(
        _train.checks, "audit", lambda model, plan: ("model.norm.weight: found float32",)
    )


def test_train_shows_plan_checks_and_report(cli, tiny):
    code, out, err = cli(*tiny)

    assert code == 0, err
    for text in ("Cast plan", "Checks", "finished:", "report.html"):
        assert text in out


def test_quiet_prints_nothing(cli, tiny):
    assert cli(*tiny, "--quiet") == (0, "", "")


def test_quiet_prints_failures(cli, tiny, forgetful):
    code, out, err = cli(*tiny, "--quiet")

    assert code == 1
    assert "FAILED" in out
    assert "ok" not in out
    assert err.startswith("automodel-fn: check failed: every tensor is as planned (model.norm")
    assert err.count("\n") == 1


def test_json_prints_only_json(cli, tiny):
    code, out, err = cli(*tiny, "--json")

    assert (code, err) == (0, "")
    assert json.loads(out)["status"] == "finished"


def test_json_of_a_run_that_failed_is_json_still(cli, tiny, forgetful):
    code, out, _ = cli(*tiny, "--json")

    assert code == 1
    assert json.loads(out)["status"] == "failed"


def test_version(cli):
    assert cli("--version") == (0, f"{automodel_fn.__version__}\n", "")


@pytest.mark.parametrize("command", [(), ("train",), ("plan",), ("doctor",), ("bench",)])
def test_help_fits_in_80_columns(cli, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    code, out, _ = cli(*command, "--help")

    assert code == 0
    assert f"Usage: {' '.join(('automodel-fn', *command))}" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "..." not in out.replace("re:...", "").replace("[ARGS]...", "")


def test_the_number_of_steps_from_which_the_loss_is_judged_is_below_the_default():
    assert _checks.MIN_STEPS_FOR_LOSS < 60
