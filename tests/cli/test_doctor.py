import io
import json

import attrs
import pytest
import torch
from rich.console import Console

from automodel_fn import BackendConfig
from automodel_fn.backend._availability import Package
from automodel_fn.backend._probe import probe
from automodel_fn.cli._doctor import availability_json, availability_tables


def test_doctor_shows_versions_devices_and_backends(cli):
    code, out, err = cli("doctor")

    assert (code, err) == (0, "")
    for text in ("Versions", torch.__version__, "Devices", "CPU", "Backends", "runs here"):
        assert text in out


def test_doctor_shows_what_is_chosen_here_and_why(cli):
    code, out, err = cli("doctor")

    assert (code, err) == (0, "")
    table = out.partition("What BackendConfig() chooses here")[2]
    for text in ("attn", "linear", "rope_fusion", "experts", "dispatcher", "auto: the first of"):
        assert text in table
    assert "fake_balanced_gate" not in table


def test_json_has_a_reason_for_every_backend_that_cannot_run(cli):
    code, out, err = cli("doctor", "--json")

    assert (code, err) == (0, "")
    data = json.loads(out)
    assert data["torch"] == torch.__version__
    assert data["backends"]
    assert all(each["can_run"] or each["reason"] for each in data["backends"])


def test_json_has_a_reason_for_every_field_of_the_default_backend(cli):
    code, out, err = cli("doctor", "--json")

    assert (code, err) == (0, "")
    fields = json.loads(out)["default_backend"]
    assert [each["field"] for each in fields] == [f.name for f in attrs.fields(BackendConfig)]
    assert all(each["reason"] and each["runs"] != "auto" for each in fields)


def with_te(version, problem=""):
    te = Package("transformer-engine", version=version, problem=problem)
    return attrs.evolve(probe(), packages=(te,))


def shown(found):
    console = Console(width=200, record=True, file=io.StringIO())
    for table in availability_tables(found):
        console.print(table)
    return console.export_text()


def test_doctor_says_where_transformer_engine_keeps_no_weights_and_what_it_keeps_unsharded():
    found = with_te("2.20.2")

    for text in (shown(found), availability_json(found)):
        assert "LayerNormMLP keep no quantized weights" in text
        assert "GroupedLinear keeps its own, unsharded" in text


@pytest.mark.parametrize(("version", "problem"), [(None, ""), ("2.20.2", "cannot be imported")])
def test_doctor_says_nothing_of_a_transformer_engine_that_cannot_be_used(version, problem):
    found = with_te(version, problem)

    assert "Good to know" not in shown(found)
    assert json.loads(availability_json(found))["remarks"] == []
