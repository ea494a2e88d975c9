"""The fp32 pins of every class of transformers that declares some, against transformers' own."""

import pytest
import zoo_table
from transformers.core_model_loading import build_glob_alternation
from zoo_cases import (
    ARCHITECTURES,
    CASES,
    CONSTRUCTED,
    RETYPED,
    VERSION,
    architecture_of,
    build,
    is_version_of_the_table,
    module_of,
    on_meta,
    plan_of,
)
from zoo_declaring import DECLARING, declaring_classes, family_of

from automodel_fn import bf16, cast_plan, fp16, fp32

EACH = pytest.mark.parametrize("case", CASES)
EACH_ARCHITECTURE = pytest.mark.parametrize("case", ARCHITECTURES)


def kept(plan):
    return {name for entry in plan.entries if entry.action == "keep" for name in entry.names}


def named_tensors(model):
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


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
    keywords = {k for attribute in DECLARING for k in getattr(declaring, attribute) or ()}
    names = [name for name, _ in named_tensors(on_meta(case))]

    assert keywords
    assert {keyword for keyword in keywords if not any(keyword in n for n in names)} == set()


@EACH
def test_the_small_model_is_small(case):
    assert sum(p.numel() for p in on_meta(case).parameters()) < 250_000


@EACH
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=["bf16", "fp16"])
def test_the_plan_keeps_what_transformers_keeps(case, dtype):
    model = on_meta(case)

    assert kept(plan_of(case, dtype, "hf")) == kept_by_transformers(model, dtype)


@EACH
def test_only_these_are_float32_by_their_construction_alone(case):
    model = build(case, dtype=bf16)
    stored = {name for name, tensor in model.state_dict().items() if tensor.dtype == fp32}

    assert stored - kept_by_transformers(model, bf16) == CONSTRUCTED.get(case, set())


@EACH_ARCHITECTURE
def test_from_pretrained_gives_every_tensor_the_dtype_of_the_plan(case, tmp_path):
    model = build(case, device="cpu")
    entries = cast_plan(model, bf16, match="hf").entries

    model.save_pretrained(tmp_path)
    loaded = architecture_of(case).from_pretrained(tmp_path, dtype=bf16)

    found = {name: tensor.dtype for name, tensor in named_tensors(loaded)}
    planned = {name: entry.to_dtype for entry in entries for name in entry.names}
    assert found.keys() == planned.keys()
    different = {name for name, dtype in found.items() if dtype != planned[name]}
    assert different == CONSTRUCTED.get(case, set()) | RETYPED.get(case, set())
    assert all(found[name] == fp32 for name in different)


@pytest.mark.skipif(
    not is_version_of_the_table(), reason=f"the table in the docs is about transformers {VERSION}"
)
def test_the_table_in_the_docs_is_what_the_plans_say():
    assert zoo_table.committed() == zoo_table.table(), f"write it anew: {zoo_table.COMMAND}"
