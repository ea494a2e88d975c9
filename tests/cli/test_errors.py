import json

import pytest

from automodel_fn.cli._configs import quiet_transformers


def refused(result, *fragments):
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("automodel-fn: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for fragment in fragments:
        assert fragment in err


@pytest.fixture
def places(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    (tmp_path / "nothing.txt").write_text("")
    (tmp_path / "short.txt").write_text("short")
    return tmp_path


SETTINGS = [
    (("--microbatches", "0"), "microbatches=0 must be at least 1"),
    (("--steps", "0"), "steps=0 must be at least 1"),
    (("--batch-size", "-1"), "batch_size=-1 must be at least 1"),
    (("--seq-len", "1"), "seq_len=1 must be at least 2"),
    (("--seed", "-1"), "seed=-1"),
    (("--dtype", "bf15"), "dtype='bf15' is not a dtype"),
    (("--dtype", "int8"), "int8"),
    (("--learning-rate", "nan"), "learning_rate=nan"),
    (("--learning-rate", "0"), "learning_rate=0"),
]
PLACES = [
    ("--out", "full", "is not empty; name a new folder"),
    ("--out", "full/file", "is no folder"),
    ("--out", "full/file/under", "is no folder"),
    ("--data", "missing", "does not exist"),
    ("--data", "empty", "has no text in it"),
    ("--data", "nothing.txt", "has no text in it"),
    ("--data", "short.txt", "has 5 bytes, fewer than seq_len=128"),
    ("--model", "missing/", "is no folder"),
    ("--model", "empty", "has no config.json"),
    ("--model", "full/file", "is no folder"),
]


@pytest.mark.parametrize(("option", "message"), SETTINGS)
def test_a_setting_that_cannot_be_is_one_line(cli, tmp_path, option, message):
    refused(cli("train", "--out", tmp_path / "run", *option), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("option", "place", "message"), PLACES)
def test_a_place_that_cannot_be_is_one_line(cli, places, option, place, message):
    out = () if option == "--out" else ("--out", places / "run")
    refused(cli("train", option, f"{places}/{place}", *out), message)
    assert not (places / "run").exists()


def test_the_run_folder_is_checked_before_data_and_model(cli, places):
    given = ("--data", places / "missing", "--model", "lama")

    refused(cli("train", "--out", places / "full", *given), "out=")
    refused(cli("train", "--out", places / "run", *given), "data=")


@pytest.mark.parametrize("command", [("train", "--model"), ("plan",)])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("lama", "near: llama"),
        ("t5", "has a causal LM"),
        ("bert", "is_decoder=False"),
        ("zzzzzz", "has a causal LM.\n"),
    ],
)
def test_a_type_without_a_causal_lm_is_one_line(
    cli, tmp_path, text_file, monkeypatch, command, model, message
):
    monkeypatch.chdir(tmp_path)
    more = ("--data", text_file) if command[0] == "train" else ()

    refused(cli(*command, model, *more), f"model={model!r}", message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [("train", "--out", "run", "--model"), ("plan",)])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "vit"}, "of type 'vit', of which transformers has no causal LM"),
        ({"model_type": "bert"}, "is_decoder=False"),
        ({"model_type": "lama"}, "transformers cannot read"),
        ({}, "transformers cannot read"),
        ("{", "transformers cannot read"),
        ({"model_type": "llama", "hidden_size": -3}, ""),
        ({"model_type": "llama", "hidden_size": "wide"}, ""),
    ],
)
def test_a_folder_without_a_causal_lm_is_one_line(
    cli, tmp_path, monkeypatch, command, config, message
):
    monkeypatch.chdir(tmp_path)
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_text(text)

    refused(cli(*command, "./"), "model=", message)


def test_a_folder_without_weights_is_one_line(cli, tmp_path, checkpoint, small_llama):
    folder = checkpoint(small_llama)

    refused(cli("train", "--model", folder, "--out", tmp_path / "run"), "could not be loaded")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def small_llama():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )


def saved(config, folder):
    from transformers import LlamaForCausalLM

    with quiet_transformers():
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_more_tokens_than_positions_is_one_line(cli, tmp_path, small_llama):
    folder = saved(small_llama, tmp_path / "small")

    refused(
        cli("train", "--model", folder, "--out", tmp_path / "run"),
        "seq_len=128 must be at most 64",
    )


def test_a_vocabulary_too_small_for_bytes_is_one_line(cli, tmp_path, small_llama):
    small_llama.vocab_size = 100
    folder = saved(small_llama, tmp_path / "small")

    refused(cli("train", "--model", folder, "--out", tmp_path / "run"), "a vocabulary of 100")
