import json

import pytest
import torch
from torch import nn

from automodel_fn import CastPlan
from automodel_fn.cli import _train
from automodel_fn.cli._run_folder import save_model
from automodel_fn.plans import apply
from automodel_fn.step import StepContext


def verdicts(report):
    return {check.claim: check.passed for check in report.checks}


def test_a_run_leaves_plan_report_page_and_model(trained, tmp_path):
    report = trained()

    out = tmp_path / "run"
    assert {path.name for path in out.iterdir()} == {
        "plan.json",
        "report.json",
        "report.html",
        "model",
    }
    assert CastPlan.from_json((out / "plan.json").read_text()) == report.plan
    data = json.loads((out / "report.json").read_text())
    assert data["status"] == "finished"
    assert len(data["losses"]) == 2
    assert data["num_tokens"] == 2 * 2 * 32
    assert data["settings"]["dtype"] == "bfloat16"
    assert [check["passed"] for check in data["checks"]] == [True, True, True, True, None, True]
    assert "<svg" in (out / "report.html").read_text()


def test_the_loss_is_not_judged_after_a_few_steps(trained):
    check = trained().checks[4]

    assert check.claim == "the loss on a fixed batch fell"
    assert check.verdict == "not checked"
    assert "2 steps, fewer than 20" in check.evidence


def test_the_loss_falls_in_twenty_steps(trained):
    report = trained(steps=20, microbatches=1, model="gpt2")

    assert report.failed == ()
    assert verdicts(report)["the loss on a fixed batch fell"] is True


def test_a_cast_that_loses_the_pins_is_noticed(trained):
    report = trained(cast=lambda plan, model: model.to(torch.bfloat16))

    assert report.status == "failed"
    failed = {check.claim: check.evidence for check in report.failed}
    assert "e_score_correction_bias" in failed["fp32 pins are bit-exact after the cast"]
    assert "e_score_correction_bias" in failed["fp32 pins are still float32 at the end"]
    assert "every tensor is as planned" in failed


def test_a_cast_that_rounds_the_pins_and_widens_them_again_is_noticed(trained):
    def cast(plan, model):
        pins = {entry.name for entry in plan.entries if entry.action == "keep"}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in pins:
                tensor.data.copy_(tensor.to(torch.bfloat16))
        apply(plan, model)

    (check,) = trained(cast=cast).failed
    assert check.claim == "fp32 pins are bit-exact after the cast"


def test_a_cast_that_forgets_a_tensor_is_noticed(trained):
    def cast(plan, model):
        apply(plan, model)
        model.lm_head.weight.data = model.lm_head.weight.data.float()
        model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))

    (check,) = trained(cast=cast).failed
    assert check.claim == "every tensor is as planned"
    assert "lm_head.weight" in check.evidence


def test_a_forward_with_the_step_of_another_microbatch_is_noticed(trained, monkeypatch):
    from automodel_fn.cli import _training

    monkeypatch.setattr(_training, "current_step", lambda: StepContext(True, optim_step=False))
    (check,) = trained(model="gpt2").failed

    assert check.claim == "forwards saw the step contexts of accumulate"
    assert "microbatch 2: expected StepContext(first_microbatch=False" in check.evidence


@pytest.mark.parametrize("model", [None, "gpt2"])
def test_recomputes_see_the_step_of_their_forward(trained, model):
    report = trained(activation_checkpointing=True, model=model)

    check = report.checks[3]
    assert check.passed
    reads, recomputed = (int(check.evidence.split()[at]) for at in (0, 5))
    assert 0 < recomputed == reads / 2


def test_a_saved_model_that_differs_is_noticed(trained, monkeypatch):
    def save(out, model):
        folder = save_model(out, model)
        with torch.no_grad():
            next(model.parameters()).add_(1)
        return folder

    monkeypatch.setattr(_train, "save_model", save)
    (check,) = trained(model="gpt2").failed
    assert check.claim == "the saved model loads again, bit for bit"
    assert "transformer.wte.weight" in check.evidence


def test_the_same_seed_gives_the_same_losses(trained, tmp_path):
    runs = [trained(out=tmp_path / name, model="llama") for name in "ab"]

    assert runs[0].losses == runs[1].losses


def test_a_run_goes_on_from_the_model_of_another(trained, tmp_path):
    first = trained(out=tmp_path / "first", model="llama")
    report = trained(model=str(tmp_path / "first" / "model"))

    assert report.failed == ()
    assert report.fixed_loss[0] == pytest.approx(first.fixed_loss[1], abs=1e-3)


def test_a_model_without_pins_is_not_checked_for_them(trained):
    report = trained(model="llama")

    assert [check.passed for check in report.checks[:2]] == [None, None]
    assert report.status == "finished"


def test_a_cast_that_raises_leaves_the_plan_and_a_report_that_says_running(trained, tmp_path):
    def cast(plan, model):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        trained(cast=cast, model="llama")

    assert json.loads((tmp_path / "run" / "report.json").read_text())["status"] == "running"
    assert (tmp_path / "run" / "plan.json").is_file()


def test_ctrl_c_between_plan_and_training_leaves_a_report(trained, tmp_path):
    def cast(plan: CastPlan, model: nn.Module):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(cast=cast, model="llama")

    data = json.loads((tmp_path / "run" / "report.json").read_text())
    assert data["status"] == "interrupted"
    assert data["checks"] == []
