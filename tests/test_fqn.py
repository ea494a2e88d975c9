import attrs
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from automodel_fn import ConfigError
from automodel_fn.fqn import (
    WRAPPER_SEGMENTS,
    Pattern,
    ancestry,
    has_segments,
    joined,
    owner_of,
    parse_patterns,
    unmatched_message,
    without_parametrizations,
)

NAMES = ["norm", "layers.0.norm", "layers.0.norm.weight", "layers.10.mlp", "lm_head"]


def matched(text):
    pattern = Pattern.parse(text)
    return [name for name in NAMES if pattern.matches(name)]


@pytest.mark.parametrize(
    ("fqn", "stands_for"),
    [
        ("parametrizations.weight.original", "weight"),
        ("parametrizations.weight.original0", "weight"),
        ("a.b.parametrizations.weight.original12", "a.b.weight"),
        ("a.parametrizations.weight.original.parametrizations.x.original", "a.weight.x"),
        ("a.parametrizations.weight.0.scale", "a.parametrizations.weight.0.scale"),
        ("a.parametrizations.weight.originals", "a.parametrizations.weight.originals"),
        ("a.reparametrizations.weight.original", "a.reparametrizations.weight.original"),
        ("parametrizations", "parametrizations"),
        ("weight", "weight"),
        ("", ""),
    ],
)
def test_a_parametrizations_original_stands_for_its_tensor(fqn, stands_for):
    assert without_parametrizations(fqn) == stands_for


def test_the_names_that_torch_gives_parametrizations_are_understood():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)))
    names = [without_parametrizations(name) for name, _ in model.named_parameters()]
    assert names == ["0.bias", "0.weight", "0.weight"]


def test_the_wrapper_of_torch_compile_is_known():
    name, _ = next(torch.compile(nn.Linear(2, 2), backend="eager").named_parameters())
    assert name.split(".")[0] in WRAPPER_SEGMENTS


@pytest.mark.parametrize("fqn", ["weight", "a.weight", "a.b.c.weight"])
def test_owner_and_name_join_to_the_fqn(fqn):
    name = fqn.rpartition(".")[2]
    assert joined(owner_of(fqn), name) == fqn


def test_a_tensor_of_the_root_is_owned_by_the_root():
    assert owner_of("weight") == owner_of("") == ""


def test_joining_with_the_root_adds_no_dot():
    assert [joined("", ""), joined("a", ""), joined("", "a"), joined("a", "b")] == [
        "",
        "a",
        "a",
        "a.b",
    ]


def test_ancestry_goes_upwards_and_leaves_the_root_out():
    assert list(ancestry("a.b.weight")) == ["a.b.weight", "a.b", "a"]
    assert list(ancestry("")) == []


@pytest.mark.parametrize(
    ("fqn", "keyword", "expected"),
    [
        ("mlp.gate.weight", "gate", True),
        ("mlp.gate.weight", "mlp.gate", True),
        ("mlp.gate.weight", "mlp.gate.weight", True),
        ("mlp.gate.weight", "gate.wei", False),
        ("mlp.gate_up.weight", "gate", False),
        ("mlp.gate.weight", "mlp.weight", False),
        ("wo", "wo", True),
        ("word_embeddings.weight", "wo", False),
    ],
)
def test_a_keyword_is_a_run_of_whole_segments(fqn, keyword, expected):
    assert has_segments(fqn, keyword) is expected


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("norm", ["norm"]),
        ("layers.0.norm", ["layers.0.norm"]),
        ("layers.0", []),
        ("*norm", ["norm", "layers.0.norm"]),
        ("layers.*", ["layers.0.norm", "layers.0.norm.weight", "layers.10.mlp"]),
        ("layers.?.*", ["layers.0.norm", "layers.0.norm.weight"]),
        ("layers.[12]*.mlp", ["layers.10.mlp"]),
        ("layers.[!0].*", []),
        ("*", NAMES),
        ("Norm", []),
        ("re:.*norm", ["norm", "layers.0.norm"]),
        ("re:norm", ["norm"]),
        (r"re:layers\.\d\..*", ["layers.0.norm", "layers.0.norm.weight"]),
        ("re:norm|lm_head", ["norm", "lm_head"]),
        ("re:", []),
    ],
)
def test_a_pattern_matches_whole_names(text, names):
    assert matched(text) == names


def test_an_exact_name_takes_dots_and_plus_as_they_are():
    assert not Pattern.parse("layers.0").matches("layersx0")
    assert Pattern.parse("a+b").matches("a+b")


@pytest.mark.parametrize(
    ("text", "is_exact"), [("a.b", True), ("a.*", False), ("a[0]", False), ("re:a", False)]
)
def test_only_a_plain_name_is_exact(text, is_exact):
    assert Pattern.parse(text).is_exact is is_exact


@pytest.mark.parametrize("text", ["re:(", "re:*", "re:[a"])
def test_what_is_no_regular_expression_is_an_error(text):
    with pytest.raises(ConfigError, match="is no regular expression") as caught:
        Pattern.parse(text)
    assert repr(text) in str(caught.value)


def test_an_empty_pattern_is_an_error():
    with pytest.raises(ConfigError, match="empty"):
        Pattern.parse("")


def test_patterns_are_values():
    pattern = Pattern.parse("a.*")
    assert pattern == Pattern.parse("a.*")
    assert pattern != Pattern.parse("a.?")
    assert hash(pattern) == hash(Pattern.parse("a.*"))
    assert repr(pattern) == "Pattern(text='a.*', is_exact=False)"
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        pattern.text = "b"


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("a.b", ["a.b"]),
        ((), []),
        (["b", "a", "b"], ["b", "a"]),
        ((name for name in ("a", "re:b")), ["a", "re:b"]),
    ],
)
def test_one_str_is_one_pattern_and_doubles_are_dropped(value, texts):
    assert [pattern.text for pattern in parse_patterns(value, "skip")] == texts


@pytest.mark.parametrize("value", [["a", 1], [None], b"ab", 1, None], ids=repr)
def test_what_is_no_str_is_an_error_that_names_the_argument(value):
    with pytest.raises(ConfigError, match="skip="):
        parse_patterns(value, "skip")


def test_an_unmatched_pattern_is_reported_with_the_nearest_names():
    patterns = parse_patterns(["layer.0.norm", "xyz"], "keep_fp32")
    near, far = unmatched_message("keep_fp32", patterns, NAMES).splitlines()
    expected = "keep_fp32='layer.0.norm' matches no tensor and no module; near: layers.0.norm, "
    assert near.startswith(expected)
    assert "lm_head" not in near
    assert far == "keep_fp32='xyz' matches no tensor and no module"
