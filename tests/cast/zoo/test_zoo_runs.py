"""A bf16 forward and backward of every family that declares fp32 pins, after the default plan."""

import re

import pytest
import torch
from torch.utils._pytree import tree_leaves
from zoo_cases import ARCHITECTURES, build
from zoo_inputs import inputs_for, more_of

from automodel_fn import apply, bf16, cast_plan, fp32_boundaries

EACH = pytest.mark.parametrize("case", ARCHITECTURES)

ONLY_WITH_PINS = {
    "esmfold2.EsmFold2PreTrainedModel": "mixed dtype",
    "inkling2.Inkling2PreTrainedModel": "to have the same dtype",
    "inkling2_loop.Inkling2LoopPreTrainedModel": "to have the same dtype",
    "slanext.SLANeXtPreTrainedModel": "to have the same dtype",
}
"""Classes that do not run in bf16 without their pins, with what torch says then."""

WEIGHT_READ_BY_ITS_PARENT, NOT_PART_OF_FORWARD = "its parent reads the weight", "not in forward"
ONLY_FOR_IMAGES = "only for images"
NEVER_CALLED = {
    "bailing_hybrid.BailingHybridPreTrainedModel": (WEIGHT_READ_BY_ITS_PARENT, r".*\.conv1d"),
    "blip_2.Blip2TextModelWithProjection": (
        ONLY_FOR_IMAGES,
        r"qformer\..*(crossattention|intermediate_query|output_query).*",
    ),
    "ernie4_5_vl_moe.Ernie4_5_VLMoePreTrainedModel": (ONLY_FOR_IMAGES, r".*\.vision_moe\..*"),
    "esmfold2.EsmFold2PreTrainedModel": (NOT_PART_OF_FORWARD, r"structure_head\..*"),
    "glm5_next.Glm5NextPreTrainedModel": (WEIGHT_READ_BY_ITS_PARENT, r".*\.conv1d"),
    "inkling.InklingPreTrainedModel": (WEIGHT_READ_BY_ITS_PARENT, r".*\.conv1d"),
    "inkling2.Inkling2PreTrainedModel": (WEIGHT_READ_BY_ITS_PARENT, r".*\.conv1d"),
    "inkling2_loop.Inkling2LoopPreTrainedModel": (WEIGHT_READ_BY_ITS_PARENT, r".*\.conv1d"),
    "longcat_flash.LongcatFlashPreTrainedModel": (WEIGHT_READ_BY_ITS_PARENT, r".*\.classifier"),
    "voxtral.VoxtralForConditionalGeneration": (WEIGHT_READ_BY_ITS_PARENT, r".*\.embed_positions"),
}
"""Boundaries around a forward that a run of the model does not call, and why."""

RETURNS_WHAT_A_PIN_RETURNS = {
    "hy_v4.HYV4PreTrainedModel": "logits of a pinned lm_head",
    "hy_v4_vl.HYV4VLPreTrainedModel": "logits of a pinned lm_head",
    "nemotron3_5_transcribe.Nemotron3_5TranscribeModel": "features of a pinned audio tower",
}
"""Models whose own output is float32, because a wholly pinned part of them makes it."""


def bf16_model(case):
    torch.manual_seed(0)
    return build(case, device="cpu")


class Watched:
    """The floating dtypes that each module returns, call by call."""

    def __init__(self, model):
        self.returned = {name: [] for name, _ in model.named_modules()}
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *a, name=name: self._note(name, a[-1]))

    def _note(self, name, output):
        tensors = (t for t in tree_leaves(output) if isinstance(t, torch.Tensor))
        self.returned[name].append([t.dtype for t in tensors if t.is_floating_point()])


def run(model):
    torch.manual_seed(1)
    output = model(**inputs_for(model))
    values = [*tree_leaves(dict(output)), *more_of(model)]
    floats = [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
    assert all(value.isfinite().all() for value in floats)
    if isinstance(output.get("loss"), torch.Tensor):
        floats.append(output["loss"])
    return sum(value.float().square().mean() for value in floats if value.requires_grad)


def reference(case):
    """What the modules return where nothing is pinned, or else nothing but what must be."""
    model = bf16_model(case)
    if case not in ONLY_WITH_PINS:
        model.to(bf16)
    else:
        with pytest.raises(RuntimeError, match=ONLY_WITH_PINS[case]):
            run(bf16_model(case).to(bf16))
        apply(cast_plan(model, bf16, match="hf"))
    watched = Watched(model)
    run(model)
    return watched.returned


def inside_of_pins(model, plan):
    """Names of modules that hold a pin, and of all in a module that is wholly pinned."""
    kept = {name for e in plan.entries if e.action == "keep" for name in e.names}
    owning = {name.rpartition(".")[0] for name in kept}
    whole = set()
    for name, module in model.named_modules():
        beneath = {f"{name}.{key}" for key, _ in module.named_parameters(remove_duplicate=False)}
        if name and beneath and beneath <= kept:
            whole.add(name)
    return owning | {
        name
        for name, _ in model.named_modules()
        if any(name == top or name.startswith(f"{top}.") for top in whole)
    }


def state_of(model):
    return {name: dict(vars(module)) for name, module in model.named_modules()}


@EACH
def test_it_runs_forward_and_backward_in_bf16_and_what_is_outside_keeps_bf16(case):
    model = bf16_model(case)
    plan = cast_plan(model, bf16)
    apply(plan)
    handle = fp32_boundaries(model, plan)
    watched = Watched(model)

    run(model).backward()

    inside = inside_of_pins(model, plan)
    if case in RETURNS_WHAT_A_PIN_RETURNS:
        inside.add("")
    outside = {name: dtypes for name, dtypes in watched.returned.items() if name not in inside}
    expected = reference(case)
    assert outside == {name: expected[name] for name in outside}
    assert any(outside.values())
    assert {name for name in handle.names if not watched.returned[name]} == {
        name for name in handle.names if re.fullmatch(NEVER_CALLED.get(case, ("", "-"))[1], name)
    }
    graded = [p for p in model.parameters() if p.grad is not None]
    assert graded
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in graded)
    handle.remove()
    assert not any("forward" in vars(module) for module in model.modules())


@EACH
def test_the_notes_name_the_boundaries_and_removal_leaves_no_trace(case):
    model = bf16_model(case)
    plan = cast_plan(model, bf16)
    before = state_of(model)

    with fp32_boundaries(model, plan) as handle:
        assert (state_of(model) != before) is bool(handle.names)
    noted = [note for note in plan.notes if "fp32_boundaries(model, plan): given" in note]

    assert state_of(model) == before
    for name, note in zip(handle.names, noted, strict=True):
        assert f"{name!r} (" in note
