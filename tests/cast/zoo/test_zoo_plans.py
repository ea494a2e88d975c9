"""The fp32 pins of every class of transformers that declares some, against transformers' own."""

import pytest
from transformers.core_model_loading import build_glob_alternation
from zoo_cases import (
    CASES,
    CONSTRUCTED,
    build,
    is_version_of_the_table,
    module_of,
    on_meta,
)
from zoo_declaring import DECLARING, declaring_classes, family_of

from automodel_fn import bf16, cast_plan, fp16, fp32

EACH = pytest.mark.parametrize("case", CASES)


def kept(plan):
    return {name for entry in plan.entries if entry.action == "keep" for name in entry.names}


def names(model):
    parameters = model.named_parameters(remove_duplicate=False)
    return [name for name, _ in (*parameters, *model.named_buffers(remove_duplicate=False))]


def kept_by_transformers(model, dtype):
    """As transformers decides while it loads a checkpoint: key by key, with its own matcher."""
    keywords = [
        keyword for keyword, wanted in model._get_dtype_plan(dtype).items() if wanted == fp32
    ]
    if not keywords:
        return set()
    alternation = build_glob_alternation(keywords)[0]
    names = set()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and alternation.search(name):
            names.add(name)
    return names


def test_every_class_that_declares_pins_is_in_the_table():
    found = {f"{family_of(kind)}.{kind.__name__}" for kind in declaring_classes()}

    assert sorted(found - set(CASES)) == [], "add these classes to CASES in zoo_cases.py"
    if is_version_of_the_table():
        assert found == set(CASES)


@EACH
def test_the_small_model_has_a_tensor_for_every_keyword_of_the_class(case):
    declaring = getattr(module_of(case), case.partition(".")[2])
    keywords = {
        keyword for attribute in DECLARING for keyword in getattr(declaring, attribute) or ()
    }

    assert keywords
    assert [
        k for k in sorted(keywords) if not any(k in name for name in names(on_meta(case)))
    ] == []


@EACH
def test_the_small_model_is_small(case):
    assert sum(p.numel() for p in on_meta(case).parameters()) < 250_000


@EACH
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=["bf16", "fp16"])
def test_the_plan_keeps_what_transformers_keeps(case, dtype):
    model = on_meta(case)

    assert kept(cast_plan(model, dtype, match="hf")) == kept_by_transformers(model, dtype)


@EACH
def test_only_these_are_float32_by_their_construction_alone(case):
    model = build(case, dtype=bf16)
    stored = {name for name, tensor in model.state_dict().items() if tensor.dtype == fp32}

    assert stored - kept_by_transformers(model, bf16) == CONSTRUCTED.get(case, set())
