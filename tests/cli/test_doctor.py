import json

import torch


def test_doctor_shows_versions_devices_and_backends(cli):
    code, out, err = cli("doctor")

    assert (code, err) == (0, "")
    for text in ("Versions", torch.__version__, "Devices", "CPU", "Backends", "runs here"):
        assert text in out


def test_json_has_a_reason_for_every_backend_that_cannot_run(cli):
    code, out, err = cli("doctor", "--json")

    assert (code, err) == (0, "")
    data = json.loads(out)
    assert data["torch"] == torch.__version__
    assert data["backends"]
    assert all(each["can_run"] or each["reason"] for each in data["backends"])
