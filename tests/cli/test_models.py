import pytest
import torch

from automodel_fn.cli._configs import check_source, default_config
from automodel_fn.cli._models import build_model, check_length, meta_model, recompute
from automodel_fn.cli._small import one_line, small_config
from automodel_fn.errors import ConfigError

TYPES = (
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "deepseek_v2",
    "gemma3_text",
    "mistral",
    "phi3",
)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_shrunken_type_trains_and_passes_its_checks(trained, model_type):
    report = trained(model=model_type, microbatches=1)

    assert report.failed == ()
    assert report.status == "finished"
    assert report.checks[-1].passed
    millions = float(report.model_name.split()[1])
    assert 0.5 < millions < 15


@pytest.mark.parametrize("model_type", [*TYPES, "llama", "gpt2", "mamba2", "gemma2", "opt"])
def test_a_shrunken_config_keeps_its_type_and_reads_bytes(model_type):
    config = small_config(model_type, default_config(model_type))

    assert config.model_type == model_type
    assert config.vocab_size == 256
    assert config.num_hidden_layers == 4


def test_the_built_in_model_is_a_mixture_of_experts_with_pins():
    model, is_fresh = build_model(None)

    assert is_fresh
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    assert sum(name.endswith("e_score_correction_bias") for name, _ in model.named_buffers()) == 3


def test_a_type_that_stays_large_is_refused_before_its_weights_are_made():
    with pytest.raises(ConfigError, match="could not be shrunken: it has 2,723 M parameters"):
        build_model("gemma3")


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama", "gpt2"])
def test_a_type_at_its_default_sizes_takes_no_memory(model_type):
    model = meta_model(model_type)

    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


def test_a_folder_on_the_meta_device_has_the_dtypes_that_loading_gives(tmp_path, trained):
    trained(model="gpt_oss")
    folder = tmp_path / "run" / "model"

    meta, (loaded, is_fresh) = meta_model(str(folder)), build_model(str(folder))
    assert not is_fresh
    assert {n: t.dtype for n, t in meta.state_dict().items()} == {
        n: t.dtype for n, t in loaded.state_dict().items()
    }
    assert {t.device.type for t in meta.state_dict().values()} == {"meta"}


def test_a_type_with_a_switch_that_it_does_not_read_is_causal():
    check_source("gpt_neox")


def test_lengths_up_to_the_positions_fit():
    model, _ = build_model("gpt2")
    check_length(model, 2048)

    with pytest.raises(ConfigError, match="seq_len=2049 must be at most 2048"):
        check_length(model, 2049)


def test_a_model_that_cannot_recompute_is_refused():
    model, _ = build_model("gpt2")
    type(model).supports_gradient_checkpointing = False
    try:
        with pytest.raises(ConfigError, match="GPT2LMHeadModel has no layers that can be"):
            recompute(model)
    finally:
        del type(model).supports_gradient_checkpointing


@pytest.mark.parametrize(
    ("message", "line"), [("a\n  b\n", "a b"), ("", ""), ("x" * 400, "x" * 300 + "...")]
)
def test_an_error_of_another_library_becomes_one_line(message, line):
    assert one_line(ValueError(message)) == f"ValueError: {line}"
