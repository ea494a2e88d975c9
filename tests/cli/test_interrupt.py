import json
import os
import signal
import subprocess
import sys
import time

import pytest


@pytest.mark.slow
def test_ctrl_c_in_training_leaves_a_readable_run_folder(tmp_path, text_file):
    out = tmp_path / "run"
    code = "from automodel_fn.cli import main; main()"
    numbers = [
        "--steps",
        "100000",
        "--microbatches",
        "1",
        "--batch-size",
        "1",
        "--seq-len",
        "16",
        "--model",
        "gpt2",
    ]
    command = [sys.executable, "-c", code, "train", *numbers, "--data", text_file, "--out", out]
    terminal = {"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **terminal}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        shown = ""
        deadline = time.monotonic() + 60
        while "tokens/s" not in shown and time.monotonic() < deadline:
            shown += process.stdout.read(64)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)

    assert process.returncode == 130, err
    assert err == f"automodel-fn: interrupted; what there is stands in {out}\n"
    report = json.loads((out / "report.json").read_text())
    assert report["status"] == "interrupted"
    assert all(check["passed"] is not False for check in report["checks"])
    assert json.loads((out / "plan.json").read_text())
    assert "interrupted" in (out / "report.html").read_text()
    assert not list(out.glob("*.part"))


def test_a_second_ctrl_c_while_saving_leaves_the_report(trained, tmp_path, monkeypatch):
    from automodel_fn.cli import _train

    def interrupted(*_):
        raise KeyboardInterrupt

    steps = iter(range(2))
    real = _train.torch.optim.AdamW.step

    def step(self, *arguments):
        real(self, *arguments)
        if next(steps):
            raise KeyboardInterrupt

    monkeypatch.setattr(_train.torch.optim.AdamW, "step", step)
    monkeypatch.setattr(_train, "save_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(model="gpt2")

    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["status"] == "interrupted"
    assert len(report["losses"]) == 1
    assert len(report["checks"]) == 5
