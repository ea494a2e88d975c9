import json

import attrs
import torch

from automodel_fn import BackendConfig


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
