import pytest

from automodel_fn.cli import _app
from automodel_fn.errors import PartialCastError


def refused(result, *fragments):
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("automodel-fn: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for fragment in fragments:
        assert fragment in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--match", "prefix"), "match='prefix' must be one of 'substring'"),
        (("--dtype", "float99"), "dtype='float99'"),
        (("--html", "missing/plan.html"), "html='missing/plan.html' cannot be written"),
        (("--html", "."), "it is a folder"),
    ],
)
def test_an_option_of_plan_that_cannot_be_is_one_line(cli, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    refused(cli("plan", "llama", *options), message)


@pytest.mark.parametrize("option", ["--keep-fp32", "--skip"])
def test_a_pattern_that_matches_nothing_is_named(cli, option):
    code, out, err = cli("plan", "llama", option, "nowhere.*")

    assert (code, out) == (2, "")
    assert "nowhere.*" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("casts",), "name='casts' is no benchmark; there are: cast"),
        (("cast", "--rounds", "0"), "rounds=0 must be at least 1"),
        (("cast", "--device", "tpu"), "device='tpu'"),
        (("cast", "--case", "zz*"), "case='zz*' matches no case"),
        (("cast", "--out", "missing/r.json"), "out='missing/r.json' cannot be written"),
        (("cast", "--svg", "missing/r.svg"), "svg='missing/r.svg' cannot be written"),
        (("cast", "--markdown", "missing/r.md"), "markdown='missing/r.md' cannot be written"),
        (("--from", "missing.json"), "from='missing.json' cannot be read"),
        (("cast", "--from", "x.json"), "name='cast' and from='x.json' exclude each other"),
    ],
)
def test_an_argument_of_bench_that_cannot_be_is_one_line(cli, arguments, message):
    refused(cli("bench", *arguments), message)


@pytest.mark.parametrize(
    "arguments", [("trian",), ("train", "--step", "x"), ("train", "--steps", "x"), ("plan",)]
)
def test_a_usage_error_is_readable(cli, arguments):
    code, out, err = cli(*arguments)

    assert (code, out) == (2, "")
    assert "Usage: automodel-fn" in err
    assert "Traceback" not in err


def test_any_error_of_the_library_is_exit_code_2(cli, monkeypatch):
    def fail(**options):
        raise PartialCastError("half of it")

    monkeypatch.setattr(_app, "app", fail)
    refused(cli("doctor"), "half of it")
