import json
import sys

import pytest
import torch

from automodel_fn import (
    BackendConfig,
    BackendPlan,
    BackendUnavailableError,
    CastPlan,
    ConfigError,
    apply,
)
from automodel_fn.cli._backends import FIELDS, asked_backend
from automodel_fn.cli._display import Display, console
from automodel_fn.cli._settings import TrainSettings
from automodel_fn.cli._train import train
from automodel_fn.convert._settings import settings_of

NOTHING = (None,) * len(FIELDS)
SMALL = ("--steps", 2, "--microbatches", 1, "--batch-size", 1, "--seq-len", 16)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "backend.yaml"
    path.write_text("attn: eager\nrms_norm: torch_fp32\n")
    return path


def test_nothing_asked_is_no_backend():
    assert asked_backend(None, NOTHING) is None


def test_fields_stand_over_the_file(file):
    found = asked_backend(file, ("sdpa", None, None, "false", *(None,) * 6))

    assert found == BackendConfig(attn="sdpa", rms_norm="torch_fp32", rope_fusion=False)


def test_a_file_may_be_json(tmp_path):
    path = tmp_path / "backend.json"
    path.write_text('{"attn": "eager"}')

    assert asked_backend(path, NOTHING) == BackendConfig(attn="eager")


def test_any_field_can_be_set_over_the_file_and_the_options(file):
    given = ("gate_precision=fp32", "compile_attn=true", "attn=sdpa", "fake_balanced_gate=True")
    more = ("fake_gate_noise=0.5", "dispatcher_num_sms=8", "te_fp8=none")
    found = asked_backend(file, NOTHING, (*given, *more))

    assert found == BackendConfig(
        attn="sdpa",
        rms_norm="torch_fp32",
        gate_precision="fp32",
        compile_attn=True,
        fake_balanced_gate=True,
        fake_gate_noise=0.5,
        dispatcher_num_sms=8,
    )
    assert asked_backend(None, NOTHING, ("loss=fused",)) == BackendConfig(loss="fused")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("attn", "--set 'attn' must be field=value, as compile_attn=true"),
        ("=te", "--set '=te' must be field=value"),
        ("compile_atn=true", "did you mean 'compile_attn'"),
        ("compile_attn=1.5", "compile_attn=1.5 must be True or False"),
    ],
)
def test_what_cannot_be_set_is_an_error(text, said):
    with pytest.raises(ConfigError, match=said):
        asked_backend(None, NOTHING, (text,))


def test_a_field_is_set_on_the_command_line(cli):
    code, out, err = cli(
        *("plan", "llama", "--lm-head-precision", "bf16x3", "--set", "attn=eager", "--json")
    )

    assert code == 0, err
    plan = BackendPlan.from_json(json.dumps(json.loads(out)["backend_plan"]))
    assert {e.after for e in plan.entries if e.field == "attn"} == {"eager"}
    assert {e.after for e in plan.entries if e.field == "lm_head_precision"} == {"bf16x3"}


@pytest.mark.parametrize("text", ["attn: [", "atn: eager", "attn: egaer"])
def test_what_is_wrong_in_a_file_is_said_with_its_name(tmp_path, text):
    path = tmp_path / "backend.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"backend='.*backend\.yaml'"):
        asked_backend(path, NOTHING)


def test_a_file_that_there_is_not_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        asked_backend(tmp_path / "none.yaml", NOTHING)


def test_with_a_backend_both_plans_are_shown(cli, file):
    code, out, err = cli("plan", "llama", "--backend", file)

    assert (code, err) == (0, "")
    assert "Cast plan" in out
    assert "Backend plan" in out
    assert "rms_norm=torch -> torch_fp32" in out
    assert out.index("attn=sdpa -> eager") < out.index("linear=torch")


def test_json_has_both_plans(cli, file):
    code, out, _ = cli("plan", "llama", "--backend", file, "--linear", "torch", "--json")

    found = json.loads(out)
    assert code == 0
    assert CastPlan.from_json(json.dumps(found["cast_plan"])).dtype == torch.bfloat16
    plan = BackendPlan.from_json(json.dumps(found["backend_plan"]))
    assert {e.after for e in plan.entries if e.field == "attn"} == {"eager"}


def test_what_cannot_run_here_is_an_error(cli, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = cli("plan", "llama", "--linear", "te")

    assert code == 2
    assert "this backend cannot run here" in err


def test_a_run_is_trained_with_its_backend_and_says_so(cli, tmp_path, text_file, file):
    out = tmp_path / "run"
    code, printed, err = cli(
        *("train", "--model", "llama", "--data", text_file, "--out", out, *SMALL),
        *("--backend", file, "--loss", "fused", "--quiet", "--json"),
    )

    assert code == 0, err
    settings = json.loads(printed)["settings"]
    assert (settings["backend"]["attn"], settings["backend"]["loss"]) == ("eager", "fused")
    plan = BackendPlan.from_json((out / "backend_plan.json").read_text())
    assert {e.after for e in plan.entries if e.field == "loss"} == {"fused"}


def test_what_is_trained_is_the_swapped_model(tmp_path, text_file):
    swapped = []

    def cast(plan, model):
        swapped.append({field for each in model.modules() for field in settings_of(each)})
        return apply(plan, model)

    settings = TrainSettings(
        model="llama",
        data=(text_file,),
        steps=2,
        microbatches=1,
        batch_size=1,
        seq_len=16,
        backend=BackendConfig(attn="sdpa", linear="torch", loss="torch"),
        out=tmp_path / "run",
    )
    train(settings, Display(console(), is_quiet=True), cast)

    assert swapped == [{"rms_norm", "rope_fusion", "async_masks", "swiglu"}]


def test_a_run_shows_its_backend_plan(cli, tmp_path, text_file):
    options = ("--model", "llama", "--data", text_file, "--out", tmp_path / "run", *SMALL)
    code, shown, err = cli("train", *options, "--loss", "auto")

    assert code == 0, err
    assert shown.index("Backend plan") < shown.index("Cast plan")
    assert "note: the fused loss makes no logits" in " ".join(shown.split())


def test_fields_need_no_package_for_files_and_a_file_says_which_it_needs(
    monkeypatch, tmp_path, file
):
    monkeypatch.setitem(sys.modules, "cattrs", None)
    monkeypatch.setitem(sys.modules, "yaml", None)
    found = asked_backend(None, ("sdpa", *(None,) * 9), ("te_fp8=block", "gate_precision=fp32"))

    assert found == BackendConfig(attn="sdpa", te_fp8="block", gate_precision="fp32")
    told = TrainSettings(out=tmp_path, data=(file,), backend=found).to_dict()
    assert (told["backend"]["te_fp8"], told["backend"]["gate_precision"]) == ("block", "float32")
    assert (told["dtype"], told["out"], told["data"]) == ("bfloat16", str(tmp_path), [str(file)])
    with pytest.raises(BackendUnavailableError, match=r"pip install 'automodel_fn\[config\]'"):
        asked_backend(file, NOTHING)


def test_all_that_is_wrong_with_options_is_said_at_once():
    with pytest.raises(ConfigError) as caught:
        asked_backend(None, ("spda", *(None,) * 9), ("compile_atn=3", "zzz=1"))

    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines[:2] == [
        "'compile_atn' is no field; did you mean 'compile_attn'?",
        "'zzz' is no field",
    ]
    assert lines[2].startswith("attn='spda' must be one of ")
    assert lines[3] == "compile_attn=3 must be True or False"
